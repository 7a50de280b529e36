// Package analyze says of pods that are not deployed yet what they will be reachable by and what they will reach, and finds mistakes
// between them: an egress entry of one pod is held against the ingress of the pods that it leads to.
//
// It knows what the manifests tell, and nothing else.
package analyze
