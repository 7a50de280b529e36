package status

import (
	"encoding/json"
	"io"
	"net/http"
)

// ForecastPath is where it is told, over the unix socket alone, how many open connections another mesh would end.
const ForecastPath = "/forecast"

// Forecast counts the open connections that a change would end, by why.
type Forecast struct {
	Ingress map[uint16]map[EndReason]int `json:"ingress"` // by port
	Egress  map[string]map[EndReason]int `json:"egress"`  // by the listen address of the entry

	Outbound int `json:"outbound"` // those that the workload made past the egress entries
}

// maxForecastMesh bounds a mesh that is asked about: more than the largest configuration takes.
const maxForecastMesh = 32 << 20

func (s *Server) serveForecast(w http.ResponseWriter, r *http.Request) {
	if overTCP(r) {
		http.NotFound(w, r)
		return
	}
	mesh, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxForecastMesh))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	forecast, err := s.Source.Forecast(mesh)
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(forecast) // it fails if the client is gone
}
