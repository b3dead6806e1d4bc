package snapbroker

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	zmq "github.com/pebbe/zmq4"
)

func keyFile(t *testing.T, text string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "client.key")
	check(t, os.WriteFile(path, []byte(text), mode))
	check(t, os.Chmod(path, mode))
	return path
}

func TestKeyFiles(t *testing.T) {
	const (
		public = "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID"
		secret = "D:)Q[IlAW!ahhC2ac:9*A}h:p?([4%wOTJ%JR%cs"
		server = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
		remote = "tcp://127.0.0.1:9"
	)
	whole := fmt.Sprintf("# mine\r\nname = \"farm\"\r\n\n\tpublic_key=%q # \"\nsecret_key = %q\nserver_key = %q", public, secret,
		server)
	keys := must(keysFor(remote, keyFile(t, whole, 0o600), ""))(t)
	if *keys != (curveKeys{public, secret, server}) {
		t.Errorf("keys %+v", keys)
	}
	if keys := must(keysFor("ipc:///x", "nowhere", ""))(t); keys != nil {
		t.Error("keys for a socket of this machine")
	}
	pub := keyFile(t, fmt.Sprintf("public_key = %q\n", public), 0o644)
	if keys := must(keysFor(remote, keyFile(t, whole, 0o600), pub))(t); keys.server != public {
		t.Errorf("keys %+v", keys)
	}
	t.Setenv(ClientKeyVariable, keyFile(t, whole, 0o400))
	t.Setenv(ServerKeyVariable, public)
	if keys := must(keysFor(remote, "", ""))(t); keys.server != public || keys.secret != secret {
		t.Errorf("keys %+v", keys)
	}
	t.Setenv(ServerKeyVariable, "")
	without := strings.ReplaceAll(whole, "server_key", "other")
	for name, path := range map[string]string{
		"not there":    filepath.Join(t.TempDir(), "none"),
		"readable":     keyFile(t, whole, 0o640),
		"no server":    keyFile(t, without, 0o600),
		"no secret":    pub,
		"twice":        keyFile(t, whole+"\nname = \"x\"", 0o600),
		"malformed":    keyFile(t, whole+"\nnonsense", 0o600),
		"trailing":     keyFile(t, strings.Replace(whole, `"farm"`, `"farm" x`, 1), 0o600),
		"another pair": keyFile(t, strings.Replace(whole, public, server, 1), 0o600),
		"no key":       keyFile(t, strings.Replace(whole, secret, "short", 1), 0o600),
		"directory":    t.TempDir(),
	} {
		told := refused(t, errorOf(keysFor(remote, path, "")), ErrInvalidArgument)
		if strings.Contains(told.Message, secret) {
			t.Errorf("%s: the secret is in the message", name)
		}
	}
}

// The handshake itself, with a router that knows one client.
func TestCurve(t *testing.T) {
	check(t, zmq.AuthStart())
	defer zmq.AuthStop()
	serverPublic, serverSecret, err := zmq.NewCurveKeypair()
	check(t, err)
	router := must(zmq.NewSocket(zmq.ROUTER))(t)
	defer func() { _ = router.Close() }()
	check(t, router.SetLinger(0))
	check(t, router.SetRcvtimeo(patienceOfTests))
	check(t, router.ServerAuthCurve("snapbroker", serverSecret))
	check(t, router.Bind("tcp://127.0.0.1:*"))
	endpoint := must(router.GetLastEndpoint())(t)
	key := func(server string) (path, public string) {
		public, secret, err := zmq.NewCurveKeypair()
		check(t, err)
		return keyFile(t, fmt.Sprintf("public_key = %q\nsecret_key = %q\nserver_key = %q\n", public, secret, server),
			0o600), public
	}
	known, public := key(serverPublic)
	zmq.AuthCurveAdd("snapbroker", public)
	ctx := background(t)

	c := dial(t, WithEndpoint(endpoint), WithSnapshotter("fake"), WithClientKey(known),
		WithConnectTimeout(patienceOfTests))
	done := make(chan error)
	go func() { done <- errorOf(c.Stat(ctx, "x")) }()
	frames := must(router.RecvMessageBytes(0))(t)
	part := body((*writer).reply, reply{outcomes: []outcome{okInfo(0, "x")}})
	must(router.SendMessage(frames[0], frames[1], frames[2], partLast, part))(t)
	check(t, <-done)

	unknown, _ := key(serverPublic)
	c = dial(t, WithEndpoint(endpoint), WithSnapshotter("fake"), WithClientKey(unknown),
		WithConnectTimeout(patienceOfTests))
	refused(t, errorOf(c.Stat(ctx, "x")), ErrUnauthenticated)
	c = dial(t, WithEndpoint(endpoint), WithSnapshotter("fake"), WithConnectTimeout(patienceOfTests))
	refused(t, errorOf(c.Stat(ctx, "x")), ErrUnauthenticated)
	// A key that is given later works without another Dial.
	late, latePublic := key(serverPublic)
	c = dial(t, WithEndpoint(endpoint), WithSnapshotter("fake"), WithClientKey(late), WithConnectTimeout(patienceOfTests))
	refused(t, errorOf(c.Stat(ctx, "x")), ErrUnauthenticated)
	zmq.AuthCurveAdd("snapbroker", latePublic)
	go func() { done <- errorOf(c.Stat(ctx, "x")) }()
	frames = must(router.RecvMessageBytes(0))(t)
	must(router.SendMessage(frames[0], frames[1], frames[2], partLast, part))(t)
	check(t, <-done)
	wrong, wrongPublic := key(public)
	zmq.AuthCurveAdd("snapbroker", wrongPublic)
	c = dial(t, WithEndpoint(endpoint), WithSnapshotter("fake"), WithClientKey(wrong), WithConnectTimeout(patienceOfTests/30))
	refused(t, errorOf(c.Stat(ctx, "x")), ErrUnauthenticated)
	refused(t, errorOf(Dial(ctx, WithEndpoint(endpoint), WithClientKey("nowhere"))), ErrInvalidArgument)
}

// A real broker's remote sockets: calls, events that heal over its restart, and a key that may only read.
func TestCurveOfBroker(t *testing.T) {
	t.Parallel()
	if told, err := exec.Command(executable(t), "keys", "--help").CombinedOutput(); err != nil {
		t.Fatalf("snapbrokerd keys: %v: %s", err, told)
	}
	keys := t.TempDir()
	check(t, os.Chmod(keys, 0o700))
	write := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(keys, name)
		check(t, os.WriteFile(path, []byte(text), mode))
		return path
	}
	serverPublic, serverSecret, err := zmq.NewCurveKeypair()
	check(t, err)
	write("server.key", fmt.Sprintf("public_key = %q\nsecret_key = %q\n", serverPublic, serverSecret), 0o600)
	server := write("server.pub", fmt.Sprintf("public_key = %q\n", serverPublic), 0o644)
	grant := func(name, role string) string {
		public, secret, err := zmq.NewCurveKeypair()
		check(t, err)
		write(name+".toml", fmt.Sprintf("public_key = %q\nrole = %q\nnamespaces = [\"default\"]\n", public, role), 0o644)
		return keyFile(t, fmt.Sprintf("public_key = %q\nsecret_key = %q\n", public, secret), 0o600)
	}
	writer, reader := grant("writer", "write"), grant("reader", "read")
	ports := [2]string{}
	for i := range ports {
		listener := must(net.Listen("tcp", "127.0.0.1:0"))(t)
		ports[i] = tcp + listener.Addr().String()
		check(t, listener.Close())
	}
	d := startDaemon(t, fmt.Sprintf("[publisher]\nheartbeat_ms = 100\n[tcp]\nendpoint = %q\nevents_endpoint = %q\nkeys = %q\n"+
		"[snapshotters.overlayfs]\n", ports[0], ports[1], keys))
	ctx := background(t)
	remote := func(key string) *Client {
		return dial(t, WithEndpoint(ports[0]), WithSnapshotter("overlayfs"), WithClientKey(key), WithServerKey(server),
			WithPatience(patienceOfTests), WithConnectTimeout(patienceOfTests))
	}
	c, looker := remote(writer), remote(reader)
	subscriber := must(looker.Subscribe(ctx))(t)
	defer subscriber.Close()
	for _, key := range []string{"before", "after"} {
		must(c.Prepare(ctx, key, ""))(t)
		if event := must(subscriber.Next(ctx))(t); event.Key != key {
			t.Errorf("event %+v, not of %q", event, key)
		}
		if key == "before" {
			d.kill()
			d.start()
		}
	}
	must(looker.Stat(ctx, "after"))(t)
	told := refused(t, looker.Remove(ctx, "after"), ErrPermissionDenied)
	if told.Details["needed"] != "write" {
		t.Errorf("details %v", told.Details)
	}
	elsewhere := must(c.In("", "other"))(t)
	refused(t, errorOf(elsewhere.Stat(ctx, "x")), ErrPermissionDenied)
}
