// Package peers keeps who is at the other end of the connections that go through Envoy.
package peers
