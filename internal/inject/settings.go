package inject

import (
	"fmt"
	"strconv"
	"strings"
)

// Options are what inject gives the pods that say nothing else themselves, by annotations. The zero value of a field gives nothing.
type Options struct {
	Ingress    string // entries name#port#disableTLS, joined by ##
	Egress     string // entries name#listen-ip:listen-port#host:port, joined by ##
	ConfigMap  string // with the override file: a name, and behind a slash the key, else mantlet.yaml
	TLSSecret  string // with certChain.pem, key.pem and mesh-ca.pem
	StatusPort string // where mantlet serves its status
	Image      string // of mantlet
	Gate       bool   // containers wait for mantlet before they execute their commands

	// NoServerNames leaves it to the override file whose certificates egress entries accept.
	NoServerNames bool
}

// DefaultImage is the image of sidecars where nothing else is said.
const DefaultImage = "mantlet:latest"

// settings are what a pod's sidecar is given.
type settings struct {
	ingress, egress     *string // nil for none
	configMap, key      string
	tlsSecret           string
	image               string
	statusPort          uint16
	isAdmin             bool // the status port is as protected as its ingress entry says
	gate, noServerNames bool
	sources             map[string]string // by variable: the annotation or the flag that it is from
}

// The annotations. Those of Contrast mean the same.
const (
	prefix         = "mantlet/"
	contrastPrefix = "contrast.edgeless.systems/servicemesh-"
)

// resolve returns the settings of a pod; whether its author does not want it to have a sidecar; notes of flags that it does not
// follow; and what is wrong.
func (s subject) resolve(o Options) (found settings, isOut bool, notes, wrong []string) {
	read := func(flag, value string, names ...string) (*string, string) {
		var got *string
		source := ""
		for _, name := range names {
			v, ok := s.annotation(name)
			switch {
			case !ok:
			case got == nil:
				got, source = &v, name
			case *got != v:
				wrong = append(wrong, fmt.Sprintf("the annotations %s and %s differ; keep one of them", source, name))
			}
		}
		switch {
		case got == nil && value != "":
			return &value, "--" + flag
		case got != nil && value != "" && value != *got:
			notes = append(notes, fmt.Sprintf("its annotation %s is followed, and not --%s", source, flag))
		}
		return got, source
	}
	isTrue := func(value bool, name string) bool {
		v, ok := s.annotation(name)
		if !ok {
			return value
		}
		is, err := strconv.ParseBool(v)
		if err != nil {
			wrong = append(wrong, fmt.Sprintf("the annotation %s is %q and must be true or false", name, v))
		}
		return is
	}
	isOut = !isTrue(true, prefix+"inject")
	found = settings{gate: isTrue(o.Gate, prefix+"gate"), noServerNames: o.NoServerNames, sources: map[string]string{}}
	var ingress, egress, source string
	found.ingress, ingress = read("ingress", o.Ingress, prefix+"ingress", contrastPrefix+"ingress")
	found.egress, egress = read("egress", o.Egress, prefix+"egress", contrastPrefix+"egress")
	found.sources[ingressVariable], found.sources[egressVariable] = ingress, egress
	value := func(flag, value string, names ...string) string {
		v, from := read(flag, value, names...)
		source = from
		if v == nil {
			return ""
		}
		return *v
	}
	found.tlsSecret = value("tls-secret", o.TLSSecret, prefix+"tls-secret")
	found.image = value("image", o.Image, prefix+"image")
	if found.image == "" {
		found.image = DefaultImage
	}
	found.configMap, found.key, _ = strings.Cut(value("config-map", o.ConfigMap, prefix+"config-map"), "/")
	if found.key == "" {
		found.key = "mantlet.yaml"
	}
	if port := value("status-port", o.StatusPort, prefix+"status-port", contrastPrefix+"admin-interface-port"); port != "" {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			wrong = append(wrong, fmt.Sprintf("%s is %q and must be a port, 1 to 65535", source, port))
		}
		found.statusPort, found.isAdmin = uint16(n), strings.HasPrefix(source, contrastPrefix)
	}
	return found, isOut, notes, wrong
}
