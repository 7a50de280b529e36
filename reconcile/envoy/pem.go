package envoy

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"unicode"
)

// This file reads PEM more strictly than RFC 7468 asks. Parsers differ in what they skip silently: where Go goes on with the next block,
// Envoy stops, and a CA that Go has read is not in force. So every block that begins is either read or an error that names it, and Envoy
// gets a text that is written from what was read.

// block is a PEM block and the number of the line that it begins at.
type block struct {
	pem.Block
	line int
}

// The markers around a block.
const (
	beginMarker = "-----BEGIN "
	endMarker   = "-----END "
	markerEnd   = "-----"
)

var (
	// beginning matches where a block begins, or was meant to begin.
	beginning = regexp.MustCompile(beginMarker + `|[-–—]\s?BEGIN ([A-Z0-9]+ )*(CERTIFICATE|KEY|CRL|PARAMETERS|REQUEST)`)
	label     = regexp.MustCompile(`^[A-Z0-9]+( [A-Z0-9]+)*$`)
)

// blocks returns all blocks of a text. Other text around them is skipped. The error names the block and its line.
func blocks(text []byte) ([]block, error) {
	var all []block
	var r blockReader
	for line := range strings.Lines(string(text)) {
		r.lines++
		complete, err := r.read(strings.TrimRight(line, " \t\r\n"))
		if err != nil {
			return nil, err
		}
		if complete {
			all = append(all, r.block)
		}
	}
	if r.inside {
		return nil, r.wrong("is cut off: the text ends within it; is it still being written?")
	}
	return all, nil
}

// blockReader reads blocks line by line.
type blockReader struct {
	block

	lines  int // read so far
	count  int // of blocks that have begun
	inside bool
	body   strings.Builder
}

func (r *blockReader) wrong(format string, args ...any) error {
	return fmt.Errorf("block %d (line %d) %s", r.count, r.line, fmt.Sprintf(format, args...))
}

// read takes a line and reports whether it completes the block.
func (r *blockReader) read(line string) (complete bool, err error) {
	if at := beginning.FindStringIndex(line); at != nil {
		return false, r.begin(line, at[0])
	}
	if !r.inside {
		return false, nil
	}
	name, value, isHeader := strings.Cut(line, ":")
	switch {
	case line == endMarker+r.Type+markerEnd:
		r.inside = false
		return true, r.decode()
	case strings.HasPrefix(line, "-"):
		return false, r.wrong("does not end with %s%s%s, but with line %d", endMarker, r.Type, markerEnd, r.lines)
	case line != "" && unicode.IsSpace(rune(line[0])):
		return false, r.wrong("is indented: line %d begins with spaces; remove them", r.lines)
	case isHeader: // RFC 1421, section 4.4
		r.Headers[name] = strings.TrimSpace(value)
	case !isBase64(line):
		return false, r.wrong("is not base64: line %d has other characters", r.lines)
	default:
		r.body.WriteString(line)
	}
	return false, nil
}

// begin starts a block at a line that has, at an offset, what looks like a marker.
func (r *blockReader) begin(line string, at int) error {
	if r.inside && !strings.HasPrefix(line, endMarker) {
		return r.wrong("is cut off: the next one begins at line %d, before its last line", r.lines)
	}
	r.count++
	r.block = block{pem.Block{Headers: map[string]string{}}, r.lines}
	before := line[:at]
	name, ok := strings.CutPrefix(line, beginMarker)
	name, ends := strings.CutSuffix(name, markerEnd)
	switch {
	case strings.HasPrefix(line, endMarker):
		return r.wrong("is glued to the one before: put a line break between %s… and %s…", endMarker, beginMarker)
	case strings.Contains(line, "\r"):
		return r.wrong("has carriage returns alone for line breaks: save the file with the line breaks of Unix")
	case strings.Contains(line, `\n`):
		return r.wrong(`has \n in its text, two characters where a line break should be`)
	case before == byteOrderMark:
		return r.wrong("has a byte order mark (BOM) before it: save the file as UTF-8 without one")
	case before != "" && strings.TrimSpace(before) == "":
		return r.wrong("is indented: line %d begins with spaces; remove them", r.lines)
	case !ok || !ends || !label.MatchString(name):
		return r.wrong("has a damaged first line: it should be like %sCERTIFICATE%s, alone on its line", beginMarker, markerEnd)
	}
	r.Type, r.inside = name, true
	r.body.Reset()
	return nil
}

func (r *blockReader) decode() (err error) {
	if r.Bytes, err = base64.StdEncoding.DecodeString(r.body.String()); err != nil {
		return r.wrong("is not base64: characters are missing, or too many")
	}
	if len(r.Bytes) == 0 {
		return r.wrong("is empty")
	}
	return nil
}

func isBase64(line string) bool {
	return !strings.ContainsFunc(line, func(c rune) bool {
		return (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '+' && c != '/' && c != '='
	})
}

const byteOrderMark = "\ufeff" // of UTF-8

// notPEM says what a text without a block is instead.
func notPEM(text []byte) error {
	base64ed := base64.StdEncoding.EncodeToString([]byte(beginMarker))
	switch {
	case len(bytes.TrimSpace(text)) == 0:
		return errors.New("is empty")
	case bytes.HasPrefix(text, []byte{0xff, 0xfe}), bytes.HasPrefix(text, []byte{0xfe, 0xff}):
		return errors.New("is UTF-16, as its byte order mark (BOM) says: save it as UTF-8 without one")
	case text[0] == 0x30: // X.690: a SEQUENCE, as certificates and keys are
		return errors.New("is DER, not PEM: convert it with openssl's option -inform DER")
	case bytes.HasPrefix(text, []byte(base64ed[:12])):
		return errors.New("is PEM in base64 once more, as the data of a Secret is: decode it with base64 -d")
	default:
		return errors.New("is not PEM: no line of it is like " + beginMarker + "CERTIFICATE" + markerEnd)
	}
}

// parseCertificates returns the certificates of a PEM text: one for each block that begins in it, at least one.
func parseCertificates(text []byte) ([]*x509.Certificate, error) {
	all, err := blocks(text)
	if err != nil {
		return nil, err
	}
	if len(all) == 0 {
		return nil, notPEM(text)
	}
	var certificates []*x509.Certificate
	for i, b := range all {
		wrong := func(format string, args ...any) error {
			return fmt.Errorf("block %d (line %d) %w", i+1, b.line, fmt.Errorf(format, args...))
		}
		switch {
		case b.Type == "TRUSTED CERTIFICATE":
			return nil, wrong("is a TRUSTED CERTIFICATE, a form of OpenSSL's own: openssl x509 writes a CERTIFICATE of it")
		case b.Type != "CERTIFICATE" && b.Type != "X509 CERTIFICATE":
			return nil, wrong("is a %s; only certificates belong here", b.Type)
		}
		certificate, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, wrong("is not a certificate that can be read: %w", err)
		}
		certificates = append(certificates, certificate)
	}
	return certificates, nil
}

// parseKey returns the first private key of a PEM text, and its block. The text may hold other things, too.
func parseKey(text []byte) (crypto.Signer, *pem.Block, error) {
	all, err := blocks(text)
	if err != nil {
		return nil, nil, err
	}
	for i, b := range all {
		if !strings.HasSuffix(b.Type, "PRIVATE KEY") {
			continue
		}
		key, err := privateKey(&b.Block)
		if err != nil {
			return nil, nil, fmt.Errorf("block %d (line %d) %w", i+1, b.line, err)
		}
		return key, &pem.Block{Type: b.Type, Bytes: b.Bytes}, nil
	}
	if len(all) == 0 {
		return nil, nil, notPEM(text)
	}
	return nil, nil, fmt.Errorf("has no private key, but a %s", all[0].Type)
}

func privateKey(b *pem.Block) (crypto.Signer, error) {
	if b.Type == "ENCRYPTED PRIVATE KEY" || strings.Contains(b.Headers["Proc-Type"], "ENCRYPTED") {
		return nil, errors.New("is encrypted: the key is encrypted with a passphrase, which mantlet has not; decrypt it with openssl pkey")
	}
	var key any
	var err error
	switch b.Type {
	case "PRIVATE KEY":
		if isPSS(b.Bytes) {
			return nil, errors.New("is an RSA-PSS key, which Envoy does not take; use an RSA key for all purposes (rsaEncryption), or ECDSA with P-256 or P-384")
		}
		key, err = x509.ParsePKCS8PrivateKey(b.Bytes)
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(b.Bytes)
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(b.Bytes)
	default:
		return nil, fmt.Errorf("is a %s, which Envoy does not read: openssl pkey writes a PRIVATE KEY (PKCS #8)", b.Type)
	}
	if err != nil {
		return nil, fmt.Errorf("is not a private key that can be read: %w", err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("is a key of type %T, which signs nothing", key)
	}
	return signer, nil
}

// isPSS reports whether a PKCS #8 key (RFC 5958) may only be used with RSASSA-PSS (RFC 4055, section 1.2).
func isPSS(der []byte) bool {
	var info struct {
		Version   int
		Algorithm struct {
			ID         asn1.ObjectIdentifier
			Parameters asn1.RawValue `asn1:"optional"`
		}
		Key []byte
	}
	_, _ = asn1.Unmarshal(der, &info)
	return info.Algorithm.ID.Equal(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 10})
}

// encode returns certificates as a PEM text.
func encode(certificates []*x509.Certificate) []byte {
	var text []byte
	for _, c := range certificates {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return text
}
