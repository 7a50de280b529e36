package envoy

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/pem"
	"strconv"
	"strings"
	"testing"
	"unicode/utf16"

	"mantlet/internal/lab"
)

// caPEM returns the PEM text of a new CA.
func caPEM(t *testing.T, name string) []byte {
	t.Helper()
	return must[*lab.Authority](t)(lab.NewAuthority(name)).CAPEM()
}

// TestParseCertificates: a text has as many certificates as blocks begin in it, or the error names the block and says what is
// wrong with it.
func TestParseCertificates(t *testing.T) {
	a, b := caPEM(t, "a"), caPEM(t, "b")
	glued := append(bytes.TrimRight(a, "\n"), b...)
	line := bytes.Count(a, []byte("\n"))
	lines := strings.SplitAfter(string(a), "\n")
	middle := len(lines) / 2
	edit := func(change func(lines []string)) []byte {
		all := append([]string{}, lines...)
		change(all)
		return []byte(strings.Join(all, ""))
	}
	wide := utf16.Encode([]rune("\ufeff" + string(a)))
	utf16text := make([]byte, 0, 2*len(wide))
	for _, unit := range wide {
		utf16text = append(utf16text, byte(unit), byte(unit>>8))
	}
	for name, c := range map[string]struct {
		text []byte
		want int    // certificates
		says string // where there are none
	}{
		"one":                      {a, 1, ""},
		"two":                      {bytes.Join([][]byte{a, b}, nil), 2, ""},
		"text around":              {bytes.Join([][]byte{[]byte("Bag Attributes\n    friendlyName: web\nsubject=CN = a\n\n# BEGIN of it\n"), a, []byte("end\n"), b, []byte("\x00")}, nil), 2, ""},
		"line breaks of Windows":   {bytes.ReplaceAll(a, []byte("\n"), []byte("\r\n")), 1, ""},
		"spaces at the lines' end": {bytes.ReplaceAll(a, []byte("\n"), []byte(" \t\n")), 1, ""},
		"no line break at the end": {bytes.TrimSpace(a), 1, ""},
		"one long line":            {[]byte(lines[0] + strings.ReplaceAll(strings.Join(lines[1:len(lines)-2], ""), "\n", "") + "\n" + lines[len(lines)-2]), 1, ""},
		"the older label":          {bytes.ReplaceAll(a, []byte(" CERTIFICATE"), []byte(" X509 CERTIFICATE")), 1, ""},

		"glued":                   {glued, 0, "block 2 (line " + strconv.Itoa(line) + ") is glued to the one before"},
		"glued, of three":         {bytes.Join([][]byte{b, glued}, nil), 0, "block 3 (line " + strconv.Itoa(2*line) + ") is glued"},
		"glued to text":           {append([]byte("text"), a...), 0, "block 1 (line 1) has a damaged first line"},
		"BOM":                     {append([]byte(byteOrderMark), a...), 0, "block 1 (line 1) has a byte order mark (BOM)"},
		"BOM within":              {bytes.Join([][]byte{a, []byte(byteOrderMark), b}, nil), 0, "block 2 (line " + strconv.Itoa(line+1) + ") has a byte order mark (BOM)"},
		"UTF-16":                  {utf16text, 0, "UTF-16"},
		"garbage within":          {bytes.Join([][]byte{a, []byte("-----BEGIN CERTIFICATE-----\nNOT BASE64 !!!\n-----END CERTIFICATE-----\n"), b}, nil), 0, "block 2 (line " + strconv.Itoa(line+1) + ") is not base64: line " + strconv.Itoa(line+2)},
		"placeholder within":      {bytes.Join([][]byte{a, []byte("-----BEGIN CERTIFICATE-----\n...\n-----END CERTIFICATE-----\n")}, nil), 0, "block 2"},
		"a character missing":     {edit(func(l []string) { l[middle] = l[middle][1:] }), 0, "block 1 (line 1) is not base64: characters are missing"},
		"empty block":             {[]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"), 0, "block 1 (line 1) is empty"},
		"cut off by the next":     {append(append([]byte{}, a[:200]...), append([]byte("\n"), b...)...), 0, "block 1 (line 1) is cut off: the next one begins at line "},
		"cut off at the end":      {a[:200], 0, "block 1 (line 1) is cut off: the text ends within it"},
		"indented":                {[]byte("    " + strings.ReplaceAll(string(a), "\n", "\n    ")), 0, "block 1 (line 1) is indented"},
		"indented within":         {edit(func(l []string) { l[middle] = "  " + l[middle] }), 0, "block 1 (line 1) is indented: line " + strconv.Itoa(middle+1)},
		`literal \n`:              {bytes.ReplaceAll(a, []byte("\n"), []byte(`\n`)), 0, `block 1 (line 1) has \n in its text`},
		"carriage returns alone":  {bytes.ReplaceAll(a, []byte("\n"), []byte("\r")), 0, "block 1 (line 1) has carriage returns"},
		"four dashes":             {bytes.Replace(a, []byte("-----BEGIN"), []byte("----BEGIN"), 1), 0, "block 1 (line 1) has a damaged first line"},
		"dashes of a text editor": {bytes.Replace(a, []byte("-----BEGIN"), []byte("———BEGIN"), 1), 0, "block 1 (line 1) has a damaged first line"},
		"another end":             {bytes.Replace(a, []byte("END CERTIFICATE"), []byte("END TRUST"), 1), 0, "block 1 (line 1) does not end with -----END CERTIFICATE-----"},
		"trusted certificate":     {bytes.ReplaceAll(a, []byte(" CERTIFICATE"), []byte(" TRUSTED CERTIFICATE")), 0, "block 1 (line 1) is a TRUSTED CERTIFICATE"},
		"a key":                   {append(append([]byte{}, a...), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte{1}})...), 0, "block 2 (line " + strconv.Itoa(line+1) + ") is a PRIVATE KEY; only certificates belong here"},
		"a revocation list":       {pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: []byte{1}}), 0, "block 1 (line 1) is a X509 CRL"},
		"no certificate":          {pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")}), 0, "block 1 (line 1) is not a certificate that can be read"},
		"nothing":                 {nil, 0, "is empty"},
		"spaces":                  {[]byte(" \n"), 0, "is empty"},
		"another text":            {[]byte("garbage"), 0, "is not PEM"},
		"DER":                     {must[[]byte](t)(base64.StdEncoding.DecodeString(strings.ReplaceAll(strings.Join(lines[1:len(lines)-2], ""), "\n", ""))), 0, "is DER, not PEM"},
		"base64 twice":            {[]byte(base64.StdEncoding.EncodeToString(a)), 0, "is PEM in base64 once more"},
	} {
		got, err := parseCertificates(c.text)
		if c.says == "" && (err != nil || len(got) != c.want) {
			t.Errorf("%s: %d certificates, %v; want %d", name, len(got), err, c.want)
		}
		if c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%s: %v; want %q", name, err, c.says)
		}
		if err != nil {
			continue
		}
		// What Envoy gets is written anew.
		again, err := parseCertificates(encode(got))
		if err != nil || len(again) != len(got) {
			t.Errorf("%s, written anew: %d certificates, %v", name, len(again), err)
		}
	}
}

// TestParseKey: keys are read in all forms that Envoy reads, and an error says which form another one has.
func TestParseKey(t *testing.T) {
	key := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	rsaKey := must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 2048))
	block := func(kind string, der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}) }
	pkcs8 := block("PRIVATE KEY", must[[]byte](t)(x509.MarshalPKCS8PrivateKey(key)))
	sec1 := block("EC PRIVATE KEY", must[[]byte](t)(x509.MarshalECPrivateKey(key)))
	var pss struct {
		Version   int
		Algorithm struct {
			ID         asn1.ObjectIdentifier
			Parameters asn1.RawValue `asn1:"optional"`
		}
		Key []byte
	}
	if _, err := asn1.Unmarshal(must[[]byte](t)(x509.MarshalPKCS8PrivateKey(rsaKey)), &pss); err != nil {
		t.Fatal(err)
	}
	pss.Algorithm.ID = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 10} // RFC 4055: id-RSASSA-PSS
	pss.Algorithm.Parameters = asn1.RawValue{}
	for name, c := range map[string]struct {
		text []byte
		says string
	}{
		"PKCS 8":            {pkcs8, ""},
		"PKCS 1":            {block("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(rsaKey)), ""},
		"SEC 1":             {bytes.Join([][]byte{block("EC PARAMETERS", []byte{6, 5, 0x2b, 0x81, 4, 0, 0x22}), sec1}, nil), ""},
		"with certificates": {append(caPEM(t, "a"), pkcs8...), ""},

		"encrypted PKCS 8":       {block("ENCRYPTED PRIVATE KEY", []byte{1}), "block 1 (line 1) is encrypted: the key is encrypted"},
		"encrypted, older":       {[]byte("-----BEGIN EC PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,00\n\nMTIz\n-----END EC PRIVATE KEY-----\n"), "block 1 (line 1) is encrypted: the key is encrypted"},
		"PSS":                    {block("PRIVATE KEY", must[[]byte](t)(asn1.Marshal(pss))), "block 1 (line 1) is an RSA-PSS key"},
		"OpenSSH":                {block("OPENSSH PRIVATE KEY", []byte{1}), "block 1 (line 1) is a OPENSSH PRIVATE KEY, which Envoy does not read"},
		"public":                 {block("PUBLIC KEY", []byte{1}), "has no private key, but a PUBLIC KEY"},
		"damaged":                {block("PRIVATE KEY", []byte{1}), "block 1 (line 1) is not a private key that can be read"},
		"BOM":                    {append([]byte(byteOrderMark), pkcs8...), "block 1 (line 1) has a byte order mark (BOM)"},
		"glued":                  {append(bytes.TrimSpace(caPEM(t, "a")), pkcs8...), "is glued to the one before"},
		"cut off":                {pkcs8[:100], "block 1 (line 1) is cut off"},
		"nothing":                {nil, "is empty"},
		"a key that is no PKCS8": {block("PRIVATE KEY", []byte("x")), "is not a private key"},
	} {
		_, got, err := parseKey(c.text)
		if c.says != "" {
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%s: %v; want %q", name, err, c.says)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if _, _, err := parseKey(pem.EncodeToMemory(got)); err != nil {
			t.Errorf("%s, written anew: %v", name, err)
		}
	}
}

// FuzzPEM: however a text is made, as many certificates are read as blocks begin in it, and Go's own parser, which passes over
// what it does not like, finds no more.
func FuzzPEM(f *testing.F) {
	authority, err := lab.NewAuthority("a")
	if err != nil {
		f.Fatal(err)
	}
	text := string(authority.CAPEM())
	for _, seed := range []string{text, text + text, strings.TrimSpace(text) + text, "\ufeff" + text, strings.ReplaceAll(text, "\n", `\n`), text[:100] + "\n" + text} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got, err := parseCertificates([]byte(text))
		if err != nil {
			return
		}
		if begins := strings.Count(text, beginMarker); begins != len(got) {
			t.Errorf("%d certificates, and %d blocks begin", len(got), begins)
		}
		count := 0
		for block, rest := pem.Decode([]byte(text)); block != nil; block, rest = pem.Decode(rest) {
			count++
		}
		if count > len(got) {
			t.Errorf("%d certificates, and Go reads %d", len(got), count)
		}
	})
}
