package snapbroker

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Where the broker is and whose snapshots are meant: options first, then the environment, then the defaults.
const (
	EndpointVariable       = "SNAPBROKER_ENDPOINT"
	EventsEndpointVariable = "SNAPBROKER_EVENTS_ENDPOINT"
	NamespaceVariable      = "SNAPBROKER_NAMESPACE"
	SnapshotterVariable    = "SNAPBROKER_SNAPSHOTTER"
	namespaceDefault       = "default"
	ipc                    = "ipc://"
	tcp                    = "tcp://"
)

func firstOf(values ...string) string {
	for _, value := range values {
		if value != "" {
			return value
		}
	}
	return ""
}

// runtimeDirectory is where a broker of this user keeps its sockets.
func runtimeDirectory() string {
	if os.Geteuid() == 0 {
		return "/run/snapbroker"
	}
	base := firstOf(os.Getenv("XDG_RUNTIME_DIR"), "/run/user/"+strconv.Itoa(os.Geteuid()))
	return filepath.Join(base, "snapbroker")
}

func routerEndpoint(given string) (string, error) {
	return asEndpoint(firstOf(given, os.Getenv(EndpointVariable), filepath.Join(runtimeDirectory(), "router.sock")))
}

// eventsEndpoint is the publisher's, "" where only the broker's status can tell it: given, else of the environment,
// else events.sock beside an ipc router's socket.
func eventsEndpoint(given, router string) (string, error) {
	if chosen := firstOf(given, os.Getenv(EventsEndpointVariable)); chosen != "" {
		return asEndpoint(chosen)
	}
	path, isIPC := strings.CutPrefix(router, ipc)
	if !isIPC || strings.HasPrefix(path, "@") {
		return "", nil
	}
	return ipc + filepath.Join(filepath.Dir(path), "events.sock"), nil
}

// reachable is the publisher's endpoint as the status tells it; on the router's host where it is bound to every host.
func reachable(status *Status, router string) (string, error) {
	sent := status.EventsEndpoint
	if sent == "" {
		return "", fault(CodeFailedPrecondition,
			"the broker at %s names no endpoint of events; pass WithEventsEndpoint or set %s", router, EventsEndpointVariable)
	}
	for _, host := range []string{"*", "0.0.0.0", "[::]"} {
		if strings.HasPrefix(sent, tcp+host+":") && strings.HasPrefix(router, tcp) {
			return router[:strings.LastIndex(router, ":")] + sent[strings.LastIndex(sent, ":"):], nil
		}
	}
	return sent, nil
}

func checkSnapshotter(name string) error {
	if err := checkText(name, "snapshotter"); err != nil {
		return err
	}
	if name == "" || len(name) > targetBytesMax || strings.Contains(name, "/") {
		return invalid("snapshotter %.80q must be 1 to %d bytes without a '/'", name, targetBytesMax)
	}
	return nil
}

// onlySnapshotter is the broker's one snapshotter.
func onlySnapshotter(status *Status, router string) (string, error) {
	names := make([]any, 0, len(status.Snapshotters))
	words := make([]string, 0, len(status.Snapshotters))
	for _, one := range status.Snapshotters {
		names = append(names, one.Name)
		words = append(words, one.Name)
	}
	switch len(names) {
	case 0:
		return "", fault(CodeNotFound, "the broker at %s has no snapshotter; `snapbrokerd doctor` says why", router)
	case 1:
		return words[0], nil
	}
	err := invalid("which snapshotter? pass one of %s, or set %s", strings.Join(words, ", "), SnapshotterVariable)
	err.Details = map[string]any{"snapshotters": names}
	return "", err
}

// asEndpoint takes a bare path for a socket of this machine.
func asEndpoint(text string) (string, error) {
	if strings.Contains(text, "://") {
		return text, nil
	}
	if rest, home := strings.CutPrefix(text, "~/"); home {
		directory, err := os.UserHomeDir()
		if err != nil {
			return "", invalid("%q names no endpoint: %v", text, err)
		}
		text = filepath.Join(directory, rest)
	}
	path, err := filepath.Abs(text)
	if err != nil {
		return "", invalid("%q names no endpoint: %v", text, err)
	}
	return ipc + path, nil
}
