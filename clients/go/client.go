package snapbroker

import (
	"context"
	"os"
	"sync/atomic"
)

// Client is one snapshotter, in one namespace, of a broker. Any number of goroutines may use it at once: their calls
// share requests.
//
// Every method returns *Error when it fails. A context's deadline is that of the call, also at the broker; one that is
// cancelled takes the call back. An error that is not InDoubt says that nothing was changed.
type Client struct {
	connection  *connection
	namespace   string
	snapshotter atomic.Pointer[string]
}

// Dial opens a connection to a broker. It waits for nothing, and the broker need not be there yet: a call waits for it,
// up to WithConnectTimeout. The connection is made anew whenever it breaks. ctx must not have ended; the connection
// lasts until Close.
func Dial(ctx context.Context, given ...Option) (*Client, error) {
	o := options{
		timeout:         timeoutDefault,
		connectTimeout:  connectTimeoutDefault,
		patience:        patienceDefault,
		callsPerRequest: callsPerRequest,
	}
	for _, option := range given {
		if err := option(&o); err != nil {
			return nil, err
		}
	}
	if ctx.Err() != nil {
		return nil, ended(ctx, false, false)
	}
	namespace := firstOf(o.namespace, os.Getenv(NamespaceVariable), namespaceDefault)
	if err := checkNamespace(namespace); err != nil {
		return nil, err
	}
	snapshotter := firstOf(o.snapshotter, os.Getenv(SnapshotterVariable))
	if snapshotter != "" {
		if err := checkSnapshotter(snapshotter); err != nil {
			return nil, err
		}
	}
	connection, err := open(&o)
	if err != nil {
		return nil, err
	}
	c := &Client{connection: connection, namespace: namespace}
	if snapshotter != "" {
		c.snapshotter.Store(&snapshotter)
	}
	return c, nil
}

// Close takes back what is under way, and closes the connection, for every client that In answered as well.
func (c *Client) Close() error { return c.connection.close() }

// In is the same connection's view of another snapshotter or namespace; "" leaves either as it is.
func (c *Client) In(snapshotter, namespace string) (*Client, error) {
	other := &Client{connection: c.connection, namespace: firstOf(namespace, c.namespace)}
	if err := checkNamespace(other.namespace); err != nil {
		return nil, err
	}
	if snapshotter == "" {
		other.snapshotter.Store(c.snapshotter.Load())
		return other, nil
	}
	if err := checkSnapshotter(snapshotter); err != nil {
		return nil, err
	}
	other.snapshotter.Store(&snapshotter)
	return other, nil
}

// Endpoint is the router's.
func (c *Client) Endpoint() string { return c.connection.endpoint }

// Namespace is whose snapshots the client means.
func (c *Client) Namespace() string { return c.namespace }

// Snapshotter is the name of the one that the client means; the broker is asked for its only one where none was named.
func (c *Client) Snapshotter(ctx context.Context) (string, error) {
	if name := c.snapshotter.Load(); name != nil {
		return *name, nil
	}
	status, err := c.connection.status(ctx)
	if err != nil {
		return "", err
	}
	name, err := onlySnapshotter(&status, c.connection.endpoint)
	if err != nil {
		return "", err
	}
	c.snapshotter.Store(&name)
	return name, nil
}

// Statistics of the connection.
func (c *Client) Statistics() Statistics {
	c.connection.mu.Lock()
	defer c.connection.mu.Unlock()
	statistics := c.connection.statistics
	statistics.UnderWay = len(c.connection.underWay)
	statistics.Unsent = len(c.connection.unsent)
	return statistics
}

func do[T any](
	ctx context.Context, c *Client, one *call, read func(*reader) T, report func(Progress),
) (value T, err error) {
	target, err := c.Snapshotter(ctx)
	if err != nil {
		return value, err
	}
	body, err := one.encode()
	if err != nil {
		return value, err
	}
	return answer(ctx, c.connection, target, c.namespace, one.verb, body, read, report)
}

// Prepare creates the active snapshot key on the committed parent, or an empty one where parent is ""; answers the
// mounts to make.
func (c *Client) Prepare(ctx context.Context, key, parent string, given ...PrepareOption) (Mounts, error) {
	one, o := prepareCall(key, parent, given)
	return do(ctx, c, one, (*reader).mounts, o.report)
}

// View creates the read-only snapshot key of the committed parent; answers the mounts to make.
func (c *Client) View(ctx context.Context, key, parent string, given ...ViewOption) (Mounts, error) {
	return do(ctx, c, viewCall(key, parent, given), (*reader).mounts, nil)
}

// Commit turns the active key into the committed name; the key is free again.
func (c *Client) Commit(ctx context.Context, name, key string, given ...CommitOption) error {
	one, o := commitCall(name, key, given)
	_, err := do(ctx, c, one, (*reader).empty, o.report)
	return err
}

// Remove removes a snapshot of any kind without children; its files are deleted in the background.
func (c *Client) Remove(ctx context.Context, key string, given ...RemoveOption) error {
	_, err := do(ctx, c, removeCall(key, given), (*reader).empty, nil)
	return err
}

// Mounts answers the mounts of an active snapshot or view, as Prepare and View answered them.
func (c *Client) Mounts(ctx context.Context, key string, given ...MountsOption) (Mounts, error) {
	return do(ctx, c, mountsCall(key, given), (*reader).mounts, nil)
}

// Stat answers what is known of a snapshot.
func (c *Client) Stat(ctx context.Context, key string) (Info, error) {
	return do(ctx, c, &call{verb: verbStat, key: key}, (*reader).info, nil)
}

// Update replaces all labels of a snapshot, or those that fieldpaths name ("labels.<key>"): each is set to its value in
// labels, and deleted where that is absent or "". It answers the snapshot with them.
func (c *Client) Update(ctx context.Context, name string, labels Labels, fieldpaths ...string) (Info, error) {
	return do(ctx, c, updateCall(name, labels, fieldpaths), (*reader).info, nil)
}

// Usage answers what a snapshot takes beyond its parents; an active one is measured, which may take time.
func (c *Client) Usage(ctx context.Context, key string, given ...UsageOption) (Usage, error) {
	one, o := usageCall(key, given)
	return do(ctx, c, one, (*reader).usage, o.report)
}

// Why answers what keeps a snapshot, or what became of it, also where there is none of this name.
func (c *Client) Why(ctx context.Context, key string) (WhyAnswer, error) {
	return do(ctx, c, &call{verb: verbWhy, key: key}, (*reader).why, nil)
}

// Cleanup waits until everything removed so far is deleted from disk.
func (c *Client) Cleanup(ctx context.Context, given ...CleanupOption) error {
	var o callOptions
	for _, option := range given {
		option.applyCleanup(&o)
	}
	_, err := do(ctx, c, &call{verb: verbCleanup}, (*reader).empty, o.report)
	return err
}

// Status answers how the broker and its snapshotters are.
func (c *Client) Status(ctx context.Context) (Status, error) { return c.connection.status(ctx) }
