package snapbroker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// A private snapbrokerd for a test: started as a user starts it, spoken to through its sockets, gone without a trace.

const patienceOfTests = time.Minute // how long anything may take on a busy machine

type daemon struct {
	t       testing.TB
	place   string
	command *exec.Cmd
}

func executable(t testing.TB) string {
	path := firstOf(os.Getenv("SNAPBROKERD"), "../../.venv/bin/snapbrokerd")
	path, err := filepath.Abs(path)
	if err == nil {
		_, err = os.Stat(path)
	}
	if err != nil {
		t.Fatalf("the tests need a snapbrokerd: run .ci/setup dev, or set SNAPBROKERD: %v", err)
	}
	return path
}

// place is a directory on a disk, with a short name: an ipc path ends at 107 bytes.
func place(t testing.TB) string {
	directory, err := os.MkdirTemp("/var/tmp", "snb-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(directory); err != nil {
			t.Error(err)
		}
	})
	return directory
}

// startDaemon runs one with these settings, in TOML, until the end of the test.
func startDaemon(t testing.TB, settings string) *daemon {
	d := &daemon{t: t, place: place(t)}
	head := fmt.Sprintf("root = %q\nruntime = %q\n", filepath.Join(d.place, "root"), filepath.Join(d.place, "run"))
	if err := os.WriteFile(filepath.Join(d.place, "config.toml"), []byte(head+settings), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if d.command != nil {
			d.stop()
		}
		if t.Failed() {
			log, _ := os.ReadFile(filepath.Join(d.place, "log"))
			t.Logf("log of snapbrokerd:\n%s", log[max(0, len(log)-8000):])
		}
	})
	d.start()
	return d
}

func (d *daemon) start() {
	d.t.Helper()
	log, err := os.OpenFile(filepath.Join(d.place, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		d.t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	d.command = exec.Command(executable(d.t), "--config", filepath.Join(d.place, "config.toml"))
	d.command.Stdout, d.command.Stderr, d.command.Dir = log, log, d.place
	if err := d.command.Start(); err != nil {
		d.t.Fatal(err)
	}
	d.ready()
}

// ready waits until every snapshotter is.
func (d *daemon) ready() {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patienceOfTests)
	defer cancel()
	client := d.dial(WithConnectTimeout(patienceOfTests))
	defer func() { _ = client.Close() }()
	for {
		status, err := client.Status(ctx)
		if err != nil {
			d.t.Fatalf("snapbrokerd does not start: %v", err)
		}
		ready := len(status.Snapshotters) > 0
		for _, one := range status.Snapshotters {
			ready = ready && one.State == "ready"
		}
		if ready {
			return
		}
		time.Sleep(10 * time.Millisecond) // Nothing tells: it paces the questions.
	}
}

func (d *daemon) stop() {
	d.t.Helper()
	if err := d.command.Process.Signal(syscall.SIGTERM); err != nil {
		d.t.Error(err)
	}
	if err := d.command.Wait(); err != nil {
		d.t.Errorf("snapbrokerd did not end well: %v", err)
	}
	d.command = nil
}

// kill ends the broker with kill -9; its actors end with it.
func (d *daemon) kill() {
	d.t.Helper()
	if err := d.command.Process.Kill(); err != nil {
		d.t.Fatal(err)
	}
	var status *exec.ExitError
	if err := d.command.Wait(); !errors.As(err, &status) {
		d.t.Fatalf("snapbrokerd ended by itself: %v", err)
	}
	d.command = nil
}

func (d *daemon) dial(given ...Option) *Client {
	d.t.Helper()
	return dial(d.t, append([]Option{
		WithEndpoint(filepath.Join(d.place, "run", "router.sock")), WithSnapshotter("memory"),
	}, given...)...)
}

// dial opens a connection that is closed at the end of the test, at the latest.
func dial(t testing.TB, given ...Option) *Client {
	t.Helper()
	client, err := Dial(context.Background(), given...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := client.Close(); err != nil {
			t.Error(err)
		}
	})
	return client
}

// shared is one daemon for all tests that do it no harm, each in a namespace of its own.
var shared struct {
	once sync.Once
	*daemon
	t *outliving
}

// outliving stands for the test in what is to last until the end of all tests.
type outliving struct {
	testing.TB
	ends   []func()
	failed bool
}

func (o *outliving) Cleanup(end func()) { o.ends = append(o.ends, end) }
func (o *outliving) Helper()            {}
func (o *outliving) Failed() bool       { return o.failed }
func (o *outliving) Error(args ...any)  { o.failed = true; fmt.Fprintln(os.Stderr, args...) }
func (o *outliving) Logf(format string, args ...any) {
	fmt.Fprintf(os.Stderr, format+"\n", args...)
}
func (o *outliving) Errorf(format string, args ...any) { o.failed = true; o.Logf(format, args...) }
func (o *outliving) Fatal(args ...any)                 { o.Error(args...); panic("the shared snapbrokerd") }
func (o *outliving) Fatalf(format string, args ...any) { o.Fatal(fmt.Sprintf(format, args...)) }

func TestMain(m *testing.M) {
	status := m.Run()
	if shared.t != nil {
		for i := len(shared.t.ends) - 1; i >= 0; i-- {
			shared.t.ends[i]()
		}
		if shared.t.failed {
			status = 1
		}
	}
	os.Exit(status)
}

// sharedClient is a client of the shared daemon, in a namespace of the test's own.
func sharedClient(t testing.TB, snapshotter string, given ...Option) *Client {
	t.Helper()
	shared.once.Do(func() {
		shared.t = &outliving{}
		shared.daemon = startDaemon(shared.t, "[snapshotters.memory]\n[snapshotters.overlayfs]\n")
	})
	if shared.daemon == nil {
		t.Fatal("the shared snapbrokerd did not start")
	}
	namespace := strings.Trim(strings.Map(func(c rune) rune {
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' {
			return c
		}
		return '-'
	}, t.Name()), "-")
	return dial(t, append([]Option{
		WithEndpoint(filepath.Join(shared.place, "run", "router.sock")), WithSnapshotter(snapshotter),
		WithNamespace(namespace),
	}, given...)...)
}

func background(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patienceOfTests)
	t.Cleanup(cancel)
	return ctx
}

func must[T any](value T, err error) func(t testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return value
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// refused takes an error apart that has to be one of the contract.
func refused(t testing.TB, err error, want error) *Error {
	t.Helper()
	var told *Error
	if !errors.Is(err, want) || !errors.As(err, &told) {
		t.Fatalf("%v, not %v", err, want)
	}
	if told.Message == "" {
		t.Errorf("%v says nothing", want)
	}
	return told
}
