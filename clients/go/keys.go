package snapbroker

import (
	"errors"
	"io"
	"os"
	"strings"

	zmq "github.com/pebbe/zmq4"
)

// The keys of 3/SNBA: who a client is at a broker's tcp endpoints, and which broker it believes.
const (
	ClientKeyVariable = "SNAPBROKER_CLIENT_KEY"
	ServerKeyVariable = "SNAPBROKER_SERVER_KEY"
	keyFileBytesMax   = 64 << 10
)

const z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"

func isKey(text string) bool {
	return len(text) == 40 && strings.Trim(text, z85) == ""
}

type curveKeys struct{ public, secret, server string }

func (k *curveKeys) apply(socket *zmq.Socket) error {
	return errors.Join(
		socket.SetCurveServerkey(k.server), socket.SetCurvePublickey(k.public), socket.SetCurveSecretkey(k.secret))
}

// keysFor are the keys for an endpoint, nil for none: those of the options, else of the environment. A socket of this
// machine takes none.
func keysFor(endpoint, clientKey, serverKey string) (*curveKeys, error) {
	path := firstOf(clientKey, os.Getenv(ClientKeyVariable))
	if path == "" || !strings.HasPrefix(endpoint, tcp) {
		return nil, nil
	}
	fields, err := readKeyFile(path)
	if err != nil {
		return nil, err
	}
	keys := &curveKeys{public: fields["public_key"], secret: fields["secret_key"], server: fields["server_key"]}
	for name, key := range map[string]string{"public_key": keys.public, "secret_key": keys.secret} {
		if !isKey(key) {
			return nil, invalid("%s has no %s of 40 characters of Z85: it is no client key file", path, name)
		}
	}
	if public, err := zmq.AuthCurvePublic(keys.secret); err != nil || public != keys.public {
		return nil, invalid("the public_key in %s is not that of its secret_key", path)
	}
	if chosen := firstOf(serverKey, os.Getenv(ServerKeyVariable)); isKey(chosen) {
		keys.server = chosen
	} else if chosen != "" {
		fields, err := readKeyFile(chosen)
		if err != nil {
			return nil, err
		}
		path, keys.server = chosen, fields["public_key"]
	}
	if keys.server == "" {
		return nil, invalid("%s asks for the broker's public key beside %s: pass WithServerKey, set %s, or put server_key "+
			"into the file", endpoint, path, ServerKeyVariable)
	}
	if !isKey(keys.server) {
		return nil, invalid("%s holds no server key of 40 characters of Z85", path)
	}
	return keys, nil
}

// readKeyFile reads a key file line by line; nobody but the owner may be able to read one that holds a secret key.
func readKeyFile(path string) (map[string]string, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, invalid("the key file cannot be read: %v", err)
	}
	defer func() { _ = file.Close() }()
	status, err := file.Stat()
	if err != nil {
		return nil, invalid("the key file cannot be read: %v", err)
	}
	text, err := io.ReadAll(io.LimitReader(file, keyFileBytesMax+1))
	if err != nil {
		return nil, invalid("the key file cannot be read: %v", err)
	}
	if len(text) > keyFileBytesMax {
		return nil, invalid("%s is longer than %d bytes: it is no key file", path, keyFileBytesMax)
	}
	fields := map[string]string{}
	for number, line := range strings.Split(string(text), "\n") {
		field, value, err := readKeyLine(strings.TrimSuffix(line, "\r"))
		if err != "" {
			// The line itself is not shown: it may hold a secret.
			return nil, invalid("line %d of the key file %s %s", number+1, path, err)
		}
		if _, twice := fields[field]; twice {
			return nil, invalid("line %d of the key file %s has the field %s a second time", number+1, path, field)
		}
		if field != "" {
			fields[field] = value
		}
	}
	if _, secret := fields["secret_key"]; secret {
		if !status.Mode().IsRegular() {
			return nil, invalid("%s holds a secret key and is no regular file", path)
		}
		if status.Mode().Perm()&0o077 != 0 {
			return nil, invalid("%s holds a secret key and has mode %04o: chmod 600 %s", path, status.Mode().Perm(), path)
		}
	}
	return fields, nil
}

// readKeyLine reads `field = "value" # comment`; what is wrong, if anything, completes a sentence.
func readKeyLine(line string) (field, value, wrong string) {
	const blank = " \t"
	line = strings.Trim(line, blank)
	if line == "" || line[0] == '#' {
		return "", "", ""
	}
	field, rest, found := strings.Cut(line, "=")
	field = strings.TrimRight(field, blank)
	for _, c := range field {
		if c != '_' && (c < '0' || c > '9') && (c < 'A' || c > 'Z') && (c < 'a' || c > 'z') {
			found = false
		}
	}
	if !found || field == "" {
		return "", "", "is not of the form field = \"value\""
	}
	rest, quoted := strings.CutPrefix(strings.TrimLeft(rest, blank), `"`)
	value, rest, closed := strings.Cut(rest, `"`)
	if !quoted || !closed {
		return "", "", "has no value in double quotes"
	}
	for _, c := range []byte(value) {
		if c < ' ' || c > '~' || c == '\\' {
			return "", "", "has a character in its value that none may have"
		}
	}
	if rest = strings.Trim(rest, blank); rest != "" && rest[0] != '#' {
		return "", "", "goes on behind its value"
	}
	return field, value, ""
}
