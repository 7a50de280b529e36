package analyze_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"mantlet/internal/analyze"
	"mantlet/internal/manifest"
)

// shop calls billing, and all is well.
const (
	shop = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: shop, namespace: store}
spec:
  template:
    metadata: {labels: {app: shop}}
    spec:
      initContainers:
        - name: mantlet
          restartPolicy: Always
          env:
            - {name: EDG_EGRESS_PROXY_CONFIG, value: "billing#127.137.0.1:8081#billing:80"}
            - {name: MANTLET_CONFIG_INLINE, value: 'egress: [{listen: "127.137.0.1:8081", serverNames: [billing]}]'}
          securityContext: {capabilities: {drop: [ALL], add: [NET_ADMIN, NET_RAW, SETUID, SETGID]}}
          startupProbe: {exec: {command: [mantlet, probe, ready]}}
          readinessProbe: {exec: {command: [mantlet, probe, ready]}}
          volumeMounts: [{name: tls, mountPath: /tls-config}, {name: run, mountPath: /run/mantlet}]
      containers:
        - name: shop
          env: [{name: BILLING, value: "http://127.137.0.1:8081/"}]
          securityContext: {capabilities: {drop: [ALL]}}
      volumes: [{name: tls, secret: {secretName: shop-tls}}, {name: run, emptyDir: {medium: Memory}}]
`
	billing = `
---
apiVersion: v1
kind: Service
metadata: {name: billing, namespace: store}
spec:
  selector: {app: billing, tier: back}
  ports: [{name: http, port: 80, targetPort: web}, {port: 90, targetPort: 9090}, {port: 53, protocol: UDP}]
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: billing-db, namespace: store}
spec:
  template:
    metadata: {labels: {app: billing, tier: back}}
    spec:
      initContainers:
        - name: mantlet
          restartPolicy: Always
          env:
            - {name: EDG_INGRESS_PROXY_CONFIG, value: "metrics#9090#true"}
            - {name: MANTLET_STATUS_ADDRESS, value: ":9901"}
            - {name: MANTLET_CONFIG_INLINE, value: 'ingress: [{port: 8080, allow: [shop, other]}]'}
          securityContext: {capabilities: {drop: [ALL], add: [NET_ADMIN, NET_RAW, SETUID, SETGID]}}
          startupProbe: {exec: {command: [mantlet, probe, ready]}}
          readinessProbe: {exec: {command: [mantlet, probe, ready]}}
          volumeMounts: [{name: tls, mountPath: /tls-config}, {name: run, mountPath: /run/mantlet}]
      containers:
        - name: billing
          ports: [{name: web, containerPort: 8080}, {name: metrics, containerPort: 9090}]
          securityContext: {capabilities: {drop: [ALL]}}
      volumes: [{name: tls, secret: {secretName: billing-tls}}, {name: run, emptyDir: {medium: Memory}}]
`
)

// look returns the reports of manifests, by object, and what is found: "problem" or "warning", object, path, reason.
func look(t *testing.T, texts ...string) (map[string]analyze.Report, []string) {
	t.Helper()
	var manifests []*manifest.Manifest
	for i, text := range texts {
		m, err := manifest.Parse(fmt.Sprintf("%d.yaml", i), []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		manifests = append(manifests, m)
	}
	reports := map[string]analyze.Report{}
	var found []string
	for _, r := range (analyze.Analyzer{Sidecars: []string{"mantlet"}}).Analyze(manifests) {
		reports[r.Object] = r
		for _, p := range r.Problems {
			found = append(found, fmt.Sprintf("problem %s %s: %s", r.Object, p.Path, p.Reason))
		}
		for _, p := range r.Warnings {
			found = append(found, fmt.Sprintf("warning %s %s: %s", r.Object, p.Path, p.Reason))
		}
	}
	return reports, found
}

func TestWords(t *testing.T) {
	reports, found := look(t, shop, billing)
	if len(found) > 0 {
		t.Errorf("found %q", found)
	}
	want := map[string]analyze.Report{
		"Deployment shop": {
			Object: "Deployment shop", Namespace: "store", HasMesh: true,
			Inbound: []string{"every port: every workload of the mesh, over mutual TLS"},
			Outbound: []string{
				"127.137.0.1:8081 (billing): billing:80, over mutual TLS, to billing: StatefulSet billing-db, port 8080",
				"everything else: as the workload sends it",
			},
		},
		"StatefulSet billing-db": {
			Object: "StatefulSet billing-db", Namespace: "store", HasMesh: true,
			Inbound: []string{
				"8080: only other, shop, over mutual TLS, by Service billing:80",
				"9090 (metrics): anyone, in plaintext, by Service billing:90",
				"9901: anyone, in plaintext: mantlet's status and its probes of the workload",
				"every other port: every workload of the mesh, over mutual TLS",
			},
			Callers:  []string{"Deployment shop, at port 8080 (billing)"},
			Outbound: []string{"everything else: as the workload sends it"},
		},
	}
	if diff := cmp.Diff(want, reports); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestMistakes(t *testing.T) {
	const egress, from = "egress[127.137.0.1:8081]: ", "problem Deployment shop "
	for name, c := range map[string]struct {
		old, new string
		want     []string // each may be the start of what is found
	}{
		"none":                        {"", "", nil},
		"other spelling":              {"#billing:80", "#billing.store.svc.cluster.local.:80", nil},
		"with a namespace":            {"#billing:80", "#billing.store:80", nil},
		"outside":                     {"#billing:80", "#pay.example.com:80", nil},
		"an address":                  {"#billing:80", "#192.0.2.7:80", nil},
		"a number in place of a name": {"targetPort: web", "targetPort: 8080", nil},

		"no such Service":            {"#billing:80", "#bill:80", []string{from + egress + "no Service of the manifests is called bill, so nobody answers to bill; did you mean billing?"}},
		"no such Service, full":      {"#billing:80", "#cart.store.svc:80", []string{from + egress + "no Service of the manifests is called cart, so nobody answers to cart.store.svc"}},
		"outside, another namespace": {"#billing:80", "#billing.bank.svc:80", []string{"warning Deployment shop " + egress + "nothing of namespace bank is in the manifests, so what answers to billing.bank.svc was not checked"}},
		"in another namespace":       {"{name: shop, namespace: store}", "{name: shop, namespace: front}", []string{from + egress + "there is no Service billing in the pod's namespace; it is in store: name it as billing.store"}},
		"wrong port":                 {"#billing:80", "#billing:8080", []string{from + egress + "Service billing has no TCP port 8080; it has 80, 90, 53"}},
		"UDP":                        {"#billing:80", "#billing:53", []string{from + egress + "Service billing has no TCP port 53"}},
		"no such targetPort":         {"targetPort: web", "targetPort: https", []string{from + egress + `port 80 of Service billing leads to the port "https", and no container of StatefulSet billing-db has one of that name`}},
		"other labels":               {"labels: {app: billing, tier: back}", "labels: {app: billing}", []string{from + egress + "Service billing selects no pod (app=billing,tier=back); StatefulSet billing-db has other labels (app=billing)"}},
		"nobody is selected":         {"labels: {app: billing, tier: back}", "labels: {app: b}", []string{"warning Deployment shop " + egress + "Service billing selects no pod of the manifests (app=billing,tier=back)"}},
		"endpoints by hand":          {"selector: {app: billing, tier: back}", "externalTrafficPolicy: Local", nil},
		"another name":               {"selector: {app: billing, tier: back}", "type: ExternalName\n  externalName: pay.example.com", nil},
		"passthrough":                {"#billing:80", "#billing:90", []string{from + egress + "speaks mutual TLS to port 9090 of StatefulSet billing-db, which is passthrough"}},
		"status":                     {"targetPort: web", "targetPort: 9901", []string{from + egress + "leads to port 9901 of StatefulSet billing-db, where mantlet serves its status in plaintext"}},
		"mantlet's own":              {"targetPort: web", "targetPort: 15006", []string{from + egress + "leads to port 15006 of StatefulSet billing-db, which is one of mantlet's own"}},
		"not declared":               {"targetPort: web", "targetPort: 8000", []string{"warning Deployment shop " + egress + "leads to port 8000 of StatefulSet billing-db, and no container there declares that port"}},
		"headless":                   {"selector: {app", "clusterIP: None\n  selector: {app", []string{"warning Deployment shop " + egress + "leads to port 80 of StatefulSet billing-db, and no container there declares that port; Service billing is headless, so its name leads to the pods and targetPort counts for nothing: name port 8080"}},
		"no mantlet there":           {"- name: mantlet\n          restartPolicy: Always\n          env:\n            - {name: EDG_INGRESS", "- name: proxy\n          restartPolicy: Always\n          env:\n            - {name: EDG_INGRESS", []string{from + egress + "speaks mutual TLS to port 8080 of StatefulSet billing-db, which has no mantlet"}},
		"not allowed":                {"allow: [shop, other]", "allow: [other]", []string{from + egress + "port 8080 of StatefulSet billing-db allows only other, and this pod is none of them: its certificate is not in the manifests, and it is called shop"}},
		"allowed by service account": {"allow: [shop, other]", "allow: [spiffe://mesh/ns/store/sa/default]", nil},
		"another service account":    {"allow: [shop, other]", "allow: [spiffe://mesh/ns/store/sa/cart]", []string{from + egress + "port 8080 of StatefulSet billing-db allows only spiffe://mesh/ns/store/sa/cart"}},
		"tls asks for nobody":        {"{port: 8080, allow: [shop, other]}", "{port: 8080, mode: tls}", nil},
		"another server name":        {"serverNames: [billing]", "serverNames: [bill]", []string{from + egress + "accepts only the certificate of bill, and StatefulSet billing-db is none of them: its certificate is not in the manifests, and it is called billing-db, billing, billing.store"}},
		"server name of a Service":   {"serverNames: [billing]", "serverNames: [billing.store.svc]", nil},
		"no protocol in common":      {"serverNames: [billing]}]", `serverNames: [billing], alpn: [h2]}]`, nil},
		"different protocols":        {"allow: [shop, other]", "allow: [shop], alpn: [http/1.1]", nil},
		"nobody listens":             {"http://127.137.0.1:8081/", "http://127.137.0.1:8082/", []string{"warning Deployment shop : the workload is told of 127.137.0.1:8082, and no egress entry listens there"}},
		"disabled":                   {"metrics#9090#true", "DISABLED", []string{from + egress + "speaks mutual TLS to port 8080 of StatefulSet billing-db, which is passthrough", "problem StatefulSet billing-db ingress[8080]: has no effect"}},
		"not valid":                  {"metrics#9090#true", "metrics#9090#maybe", []string{"problem StatefulSet billing-db disableTLS of"}},
		"not safe":                   {"app: shop}}\n    spec:", "app: shop}}\n    spec:\n      hostNetwork: true", []string{"problem Deployment shop spec.template.spec.hostNetwork: mantlet's rules would close the node"}},
	} {
		t.Run(name, func(t *testing.T) {
			all := shop + billing
			text := strings.Replace(all, c.old, c.new, 1)
			if c.old != "" && text == all {
				t.Fatalf("there is no %q", c.old)
			}
			before, after, _ := strings.Cut(text, "\n---\n")
			_, found := look(t, before, after)
			ok := len(found) == len(c.want)
			for i := range min(len(found), len(c.want)) {
				ok = ok && strings.HasPrefix(found[i], c.want[i])
			}
			if !ok {
				t.Errorf("found\n%s\nwant\n%s", strings.Join(found, "\n"), strings.Join(c.want, "\n"))
			}
		})
	}
}

// TestProtocols checks that two lists without a protocol in common are told.
func TestProtocols(t *testing.T) {
	text := strings.Replace(shop+billing, "serverNames: [billing]}]", "serverNames: [billing], alpn: [h2]}]", 1)
	text = strings.Replace(text, "allow: [shop, other]", "allow: [shop], alpn: [http/1.1]", 1)
	_, found := look(t, text)
	if want := "warning Deployment shop egress[127.137.0.1:8081]: offers the protocols h2, and port 8080 of StatefulSet billing-db has only http/1.1: they agree on none"; !slices.Equal(found, []string{want}) {
		t.Errorf("found %q", found)
	}
}

// TestIngress checks that an Ingress, which has no certificate of the mesh, is told where it leads to a port that asks for one.
func TestIngress(t *testing.T) {
	const ingress = `
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: public, namespace: store}
spec:
  rules:
    - http:
        paths:
          - {path: /, pathType: Prefix, backend: {service: {name: billing, port: {name: http}}}}
          - {path: /metrics, pathType: Prefix, backend: {service: {name: billing, port: {number: 90}}}}
`
	_, found := look(t, shop+billing+ingress)
	if want := "warning StatefulSet billing-db ingress[8080]: Ingress public leads to port 8080, which is mtls: its controller needs a certificate of the mesh, or the port must be tls"; !slices.Equal(found, []string{want}) {
		t.Errorf("found %q", found)
	}
}

// authority is a mesh CA.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

func (a *authority) issue(t *testing.T, template *x509.Certificate) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber, template.NotBefore, template.NotAfter = big.NewInt(1), time.Unix(1e9, 0), time.Unix(2e9, 0)
	parent, signer := template, key
	if a != nil {
		parent, signer = a.certificate, a.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{certificate, key}
}

func (a *authority) pem() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.certificate.Raw}))
}

func secret(name string, files map[string]string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "\n---\napiVersion: v1\nkind: Secret\nmetadata: {name: %s, namespace: store}\ndata:\n", name)
	for file, text := range files {
		fmt.Fprintf(&b, "  %s: %s\n", file, base64.StdEncoding.EncodeToString([]byte(text)))
	}
	return b.String()
}

// TestCertificates checks what is told where the manifests have the certificates.
func TestCertificates(t *testing.T) {
	ca := func(name string) *authority {
		var none *authority
		return none.issue(t, &x509.Certificate{Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	}
	mesh, other := ca("mesh"), ca("other")
	leaf := func(by *authority, names ...string) map[string]string {
		template := &x509.Certificate{Subject: pkix.Name{CommonName: "leaf"}}
		for _, name := range names {
			if u, err := url.Parse(name); err == nil && u.Scheme != "" {
				template.URIs = append(template.URIs, u)
			} else {
				template.DNSNames = append(template.DNSNames, name)
			}
		}
		return map[string]string{"certChain.pem": by.issue(t, template).pem(), "key.pem": "of no interest", "mesh-ca.pem": by.pem()}
	}
	without := func(files map[string]string, file string) map[string]string {
		delete(files, file)
		return files
	}
	const egress, from = "egress[127.137.0.1:8081]: ", "problem Deployment shop "
	for name, c := range map[string]struct {
		client, server map[string]string
		want           []string
	}{
		"good":            {leaf(mesh, "shop"), leaf(mesh, "billing"), nil},
		"wildcard":        {leaf(mesh, "shop"), leaf(mesh, "*.store.svc", "billing"), nil},
		"other client":    {leaf(mesh, "cart"), leaf(mesh, "billing"), []string{from + egress + "port 8080 of StatefulSet billing-db allows only other, shop, and this pod is none of them: its certificate has cart"}},
		"nameless server": {leaf(mesh, "shop"), leaf(mesh), []string{from + egress + "accepts only the certificate of billing, and StatefulSet billing-db is none of them: its certificate has no names"}},
		"other mesh": {leaf(mesh, "shop"), leaf(other, "billing"), []string{
			from + egress + "the certificate of StatefulSet billing-db does not lead to this pod's mesh-ca.pem",
			from + egress + "this pod's certificate does not lead to the mesh-ca.pem of StatefulSet billing-db",
		}},
		"a file is missing": {without(leaf(mesh, "shop"), "key.pem"), leaf(mesh, "billing"), []string{from + ": Secret shop-tls is mounted at /tls-config and lacks key.pem"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, found := look(t, shop+secret("shop-tls", c.client), billing+secret("billing-tls", c.server))
			ok := len(found) == len(c.want)
			for i := range min(len(found), len(c.want)) {
				ok = ok && strings.HasPrefix(found[i], c.want[i])
			}
			if !ok {
				t.Errorf("found\n%s\nwant\n%s", strings.Join(found, "\n"), strings.Join(c.want, "\n"))
			}
		})
	}
}
