package schema

import (
	"log/slog"
	"path/filepath"
)

// Process holds what only the environment may say: a mounted file never chooses which binary runs or which CA is trusted.
type Process struct {
	EnvoyPath        string     // found on PATH where it has no slash
	TLSDirectory     string     // holds certChain.pem, key.pem and mesh-ca.pem
	RuntimeDirectory string     // private to mantlet; comes to hold the key
	LogLevel         slog.Level // mantlet's own
}

func defaultProcess() Process {
	return Process{
		EnvoyPath:        "envoy",
		TLSDirectory:     "/tls-config",
		RuntimeDirectory: "/run/mantlet",
		LogLevel:         slog.LevelInfo,
	}
}

// Variables that a problem of another one names.
const (
	drainTimeVariable      = "MANTLET_ENVOY_DRAIN_TIME"
	parentShutdownVariable = "MANTLET_ENVOY_PARENT_SHUTDOWN_TIME"
)

// scalars maps each variable that holds one value to the parser that stores it in c. What the parser returns is the
// reason why a value is wrong, or nothing.
func scalars(c *Config) map[string]func(string) string {
	mesh, process := &c.Mesh, &c.Process
	return map[string]func(string) string{
		"MANTLET_TLS_MIN_VERSION":   oneOf(&mesh.TLS.MinVersion, TLS12, TLS13),
		"MANTLET_ENVOY_CONCURRENCY": concurrency(&mesh.Envoy.Concurrency),
		drainTimeVariable:           seconds(&mesh.Envoy.DrainTime),
		parentShutdownVariable:      seconds(&mesh.Envoy.ParentShutdownTime),
		"MANTLET_ENVOY_LOG_LEVEL": oneOf(&mesh.Envoy.LogLevel,
			"trace", "debug", "info", "warning", "error", "critical", "off"),
		"MANTLET_OTHER_PROTOCOLS":   oneOf(&mesh.OtherProtocols, OtherProtocolsDrop, OtherProtocolsAccept),
		"MANTLET_ACCESS_LOG":        oneOf(&mesh.AccessLog, AccessLogNone, AccessLogRefused, AccessLogAll),
		"MANTLET_ENVOY_PATH":        text(&process.EnvoyPath),
		"MANTLET_TLS_DIRECTORY":     directory(&process.TLSDirectory),
		"MANTLET_RUNTIME_DIRECTORY": directory(&process.RuntimeDirectory),
		"MANTLET_LOG_LEVEL":         level(&process.LogLevel),
	}
}

func text(field *string) func(string) string {
	return func(text string) string {
		*field = text
		return ""
	}
}

func directory(field *string) func(string) string {
	return func(text string) string {
		if !filepath.IsAbs(text) {
			return "must be an absolute path"
		}
		*field = filepath.Clean(text)
		return ""
	}
}

func level(field *slog.Level) func(string) string {
	var name string
	parse := oneOf(&name, "debug", "info", "warn", "error")
	return func(text string) string {
		if reason := parse(text); reason != "" {
			return reason
		}
		if err := field.UnmarshalText([]byte(text)); err != nil {
			return err.Error()
		}
		return ""
	}
}
