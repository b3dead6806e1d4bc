package snapbroker

import (
	"context"
	"errors"
)

// A Batch is calls that travel together, in their order. It is for one goroutine, and is sent once.
type Batch struct {
	client   *Client
	exchange *exchange
	calls    []*pending
	err      error
	sent     bool
}

// A Result is the outcome of one call of a batch.
type Result[T any] struct {
	batch *Batch
	call  *pending
	read  func(*reader) T
}

// Get answers the outcome; ErrFailedPrecondition before the batch is sent.
func (r *Result[T]) Get() (value T, err error) {
	switch {
	case r.call == nil:
		return value, r.batch.err
	case !r.call.settled:
		return value, fault(CodeFailedPrecondition, "the call has no outcome yet: Send the batch first")
	case r.call.err != nil:
		return value, r.call.err
	}
	return decode(r.call.ok, r.read, "answer")
}

// Batch is for calls that know nothing of each other.
func (c *Client) Batch() *Batch { return c.batch(false) }

// AtomicBatch is for calls that all take effect, in their order and in one transaction, or none: if one fails it has
// its error, and all others have ErrCancelled.
func (c *Client) AtomicBatch() *Batch { return c.batch(true) }

func (c *Client) batch(atomic bool) *Batch {
	return &Batch{client: c, exchange: &exchange{request: request{namespace: c.namespace}, atomic: atomic}}
}

func join[T any](b *Batch, one *call, read func(*reader) T) *Result[T] {
	r := &Result[T]{batch: b, read: read}
	body, err := one.encode()
	switch {
	case b.sent:
		err = fault(CodeFailedPrecondition, "the batch is sent: open another one")
	case err == nil && len(b.calls) >= CallsMax:
		err = invalid("a batch has at most %d calls: send what is there first", CallsMax)
	case err == nil && b.exchange.bytes+len(body) > BodyBytesMax-headBytesMax:
		err = invalid("a batch takes at most %d bytes: send what is there first", BodyBytesMax-headBytesMax)
	}
	if err != nil {
		// Told by Send as well, which then sends nothing.
		if b.err == nil {
			b.err = err
		}
		return r
	}
	r.call = &pending{verb: one.verb, body: body}
	b.exchange.add(r.call)
	b.calls = append(b.calls, r.call)
	return r
}

// Prepare adds a call as Client.Prepare makes it.
func (b *Batch) Prepare(key, parent string, given ...PrepareOption) *Result[Mounts] {
	one, _ := prepareCall(key, parent, given)
	return join(b, one, (*reader).mounts)
}

// View adds a call as Client.View makes it.
func (b *Batch) View(key, parent string, given ...ViewOption) *Result[Mounts] {
	return join(b, viewCall(key, parent, given), (*reader).mounts)
}

// Commit adds a call as Client.Commit makes it.
func (b *Batch) Commit(name, key string, given ...CommitOption) *Result[struct{}] {
	one, _ := commitCall(name, key, given)
	return join(b, one, (*reader).empty)
}

// Remove adds a call as Client.Remove makes it.
func (b *Batch) Remove(key string, given ...RemoveOption) *Result[struct{}] {
	return join(b, removeCall(key, given), (*reader).empty)
}

// Mounts adds a call as Client.Mounts makes it.
func (b *Batch) Mounts(key string, given ...MountsOption) *Result[Mounts] {
	return join(b, mountsCall(key, given), (*reader).mounts)
}

// Stat adds a call as Client.Stat makes it.
func (b *Batch) Stat(key string) *Result[Info] {
	return join(b, &call{verb: verbStat, key: key}, (*reader).info)
}

// Update adds a call as Client.Update makes it.
func (b *Batch) Update(name string, labels Labels, fieldpaths ...string) *Result[Info] {
	return join(b, updateCall(name, labels, fieldpaths), (*reader).info)
}

// Usage adds a call as Client.Usage makes it.
func (b *Batch) Usage(key string, given ...UsageOption) *Result[Usage] {
	one, _ := usageCall(key, given)
	return join(b, one, (*reader).usage)
}

// Len is the number of calls.
func (b *Batch) Len() int { return len(b.calls) }

// Send sends the calls and waits for all their outcomes, which the results then have. It answers the error of the first
// call that failed by itself; a call that was only taken back with the others of an atomic batch is not the reason. A
// batch with a call that cannot be sent is not sent at all.
func (b *Batch) Send(ctx context.Context) error {
	if b.sent {
		return fault(CodeFailedPrecondition, "the batch is sent: open another one")
	}
	if err := b.send(ctx); err != nil {
		// Without outcomes of their own all calls have the batch's error.
		for _, one := range b.calls {
			if !one.settled {
				one.settle(nil, asError(err))
			}
		}
		b.err = err
		return err
	}
	var first *Error
	for _, one := range b.calls {
		if one.err != nil && (first == nil || first.Code == CodeCancelled && one.err.Code != CodeCancelled) {
			first = one.err
		}
	}
	if first != nil {
		return first
	}
	return nil
}

// Refused says, after Send, that no call has an outcome of its own: the batch was not sent, or refused as a whole, and
// every call has that error.
func (b *Batch) Refused() bool {
	e := b.exchange
	return b.err != nil || e.outcomes == 0 && (e.refused || !e.sent && !e.doubt)
}

func (b *Batch) send(ctx context.Context) error {
	b.sent = true
	if b.err != nil || len(b.calls) == 0 {
		return b.err
	}
	target, err := b.client.Snapshotter(ctx)
	if err != nil {
		return err
	}
	b.exchange.target = target
	err = b.client.connection.run(ctx, b.exchange)
	if errors.As(err, new(*Error)) && b.exchange.unsettled == 0 && b.calls[0].settled {
		// The calls have their outcomes, also where the context ended the wait for some of them.
		return nil
	}
	return err
}
