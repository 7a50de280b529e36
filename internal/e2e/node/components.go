package node

// component is a process of the node; its log has its name.
type component struct {
	name    string
	command []string
}

// first are the components that the others ask.
var first = []component{
	{"containerd", []string{"containerd", "--config=/run/node/containerd.toml"}},
	{"etcd", []string{
		"kube", "etcd", "--data-dir=/run/node/etcd", "--unsafe-no-fsync",
		"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
		"--listen-peer-urls=http://127.0.0.1:2380",
	}},
	{"apiserver", []string{
		"kube", "kube-apiserver", "--etcd-servers=http://127.0.0.1:2379", "--advertise-address=10.77.1.1",
		"--service-cluster-ip-range=10.77.128.0/20,fd77:128::/112", "--cert-dir=/run/node/apiserver",
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file=/run/node/key.pem", "--service-account-signing-key-file=/run/node/key.pem",
		"--token-auth-file=/run/node/tokens.csv", "--authorization-mode=AlwaysAllow", "--anonymous-auth=false", "--allow-privileged=true",
		"--kubelet-preferred-address-types=InternalIP", // nobody resolves the node's name
	}},
}

var others = []component{
	{"controller-manager", []string{
		"kube", "kube-controller-manager", "--kubeconfig=/run/node/kubeconfig", "--leader-elect=false",
		"--service-account-private-key-file=/run/node/key.pem", "--root-ca-file=/run/node/apiserver/apiserver.crt",
		"--flex-volume-plugin-dir=/run/node/volume-plugins",
	}},
	{"scheduler", []string{"kube", "kube-scheduler", "--kubeconfig=/run/node/kubeconfig", "--leader-elect=false"}},
	{"proxy", []string{"kube", "kube-proxy", "--config=/run/node/proxy.yaml"}},
	{"coredns", []string{"coredns", "-conf=/run/node/Corefile"}},
	{"kubelet", []string{
		"kube", "kubelet", "--config=/run/node/kubelet.yaml", "--kubeconfig=/run/node/kubeconfig", "--cert-dir=/run/node/kubelet",
		"--hostname-override=node", "--node-ip=10.77.1.1,fd77:1::1",
	}},
}
