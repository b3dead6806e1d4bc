package snapbroker

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	zmq "github.com/pebbe/zmq4"
)

func TestVerbs(t *testing.T) {
	for _, snapshotter := range []string{"memory", "overlayfs"} {
		t.Run(snapshotter, func(t *testing.T) {
			t.Parallel()
			ctx := background(t)
			c := sharedClient(t, snapshotter)
			made := must(c.Prepare(ctx, "job", "", WithLabels(Labels{"owner": "ci", "empty": ""})))(t)
			if len(made.Mounts) == 0 || made.Fence <= 0 {
				t.Errorf("mounts %+v", made)
			}
			again := must(c.Mounts(ctx, "job", WithFence(made.Fence)))(t)
			if fmt.Sprint(again) != fmt.Sprint(made) {
				t.Errorf("mounts %+v, not %+v", again, made)
			}
			refused(t, errorOf(c.Mounts(ctx, "job", WithFence(made.Fence+1))), ErrFailedPrecondition)
			info := must(c.Stat(ctx, "job"))(t)
			if info.Name != "job" || info.Kind != Active || info.Parent != "" || !maps.Equal(info.Labels, Labels{"owner": "ci"}) {
				t.Errorf("stat %+v", info)
			}
			if age := time.Since(info.CreatedAt()); age < 0 || age > time.Hour || info.Updated != info.Created {
				t.Errorf("created %v ago, updated %v", age, info.UpdatedAt())
			}
			check(t, c.Commit(ctx, "layer", "job", WithSync(), WithFence(made.Fence), WithLabels(Labels{"ø": "ü"})))
			info = must(c.Update(ctx, "layer", Labels{"a.b/c": "1", "ignored": "x"}, "labels.a.b/c"))(t)
			if info.Kind != Committed || !maps.Equal(info.Labels, Labels{"ø": "ü", "a.b/c": "1"}) {
				t.Errorf("updated %+v", info)
			}
			usage := must(c.Usage(ctx, "layer"))(t)
			if usage.Inodes < 0 || usage.Size < 0 {
				t.Errorf("usage %+v", usage)
			}
			view := must(c.View(ctx, "look", "layer", WithLabels(Labels{"v": "1"})))(t)
			if len(view.Mounts) == 0 || view.Fence <= made.Fence {
				t.Errorf("view %+v after %+v", view, made)
			}
			refused(t, c.Remove(ctx, "layer"), ErrFailedPrecondition)
			check(t, c.Remove(ctx, "look", WithFence(view.Fence)))
			infos, sequence, err := c.List(ctx, nil)
			check(t, err)
			if len(infos) != 1 || infos[0].Name != "layer" || sequence < view.Fence {
				t.Errorf("list %+v at %d", infos, sequence)
			}
			check(t, c.Remove(ctx, "layer"))
			check(t, c.Cleanup(ctx))
			status := must(c.Status(ctx))(t)
			if len(status.Snapshotters) != 2 || status.PID == 0 || status.Version == "" || status.UptimeSeconds <= 0 {
				t.Errorf("status %+v", status)
			}
			verbs := []string{}
			for event, err := range c.Journal(ctx, 0) {
				check(t, err)
				verbs = append(verbs, event.Verb)
			}
			if want := []string{"prepare", "commit", "update", "view", "remove", "remove", "cleanup"}; !slices.Equal(verbs, want) {
				t.Errorf("journal %v, not %v", verbs, want)
			}
		})
	}
}

func errorOf[T any](_ T, err error) error { return err }

func TestErrors(t *testing.T) {
	t.Parallel()
	ctx := background(t)
	c := sharedClient(t, "memory")
	must(c.Prepare(ctx, "job", ""))(t)
	refused(t, errorOf(c.Prepare(ctx, "job", "")), ErrAlreadyExists)
	refused(t, errorOf(c.Stat(ctx, "nobody")), ErrNotFound)
	refused(t, errorOf(c.Stat(ctx, "")), ErrInvalidArgument)
	refused(t, errorOf(c.Stat(ctx, "\xff")), ErrInvalidArgument)
	refused(t, errorOf(c.Prepare(ctx, "other", "job")), ErrInvalidArgument)
	refused(t, c.Commit(ctx, "layer", "job", WithFence(1<<40)), ErrFailedPrecondition)
	refused(t, c.Commit(ctx, "layer", "job", WithFence(-1)), ErrInvalidArgument)
	refused(t, errorOf(c.Update(ctx, "job", nil, "wrong")), ErrInvalidArgument)
	_, _, err := c.List(ctx, []string{"kind=active"})
	if told := refused(t, err, ErrInvalidArgument); told.Details["filter"] != int64(0) {
		t.Errorf("details %v", told.Details)
	}
	_, _, err = c.List(ctx, nil, WithPage(0))
	refused(t, err, ErrInvalidArgument)
	for _, err := range c.Journal(ctx, 1<<40) {
		if told := refused(t, err, ErrOutOfRange); told.Details["newest"] == nil {
			t.Errorf("details %v", told.Details)
		}
	}
	elsewhere := must(c.In("nowhere", ""))(t)
	if told := refused(t, errorOf(elsewhere.Stat(ctx, "job")), ErrNotFound); told.Details["snapshotters"] == nil {
		t.Errorf("details %v", told.Details)
	}
	refused(t, errorOf(c.In("", "not/one")), ErrInvalidArgument)
	refused(t, errorOf(Dial(ctx, WithEndpoint("nonsense://"))), ErrInvalidArgument)
	unnamed := dial(t, WithEndpoint(c.Endpoint()))
	if told := refused(t, errorOf(unnamed.Stat(ctx, "job")), ErrInvalidArgument); told.Details["snapshotters"] == nil {
		t.Errorf("details %v", told.Details)
	}
	check(t, unnamed.Close())
	refused(t, errorOf(unnamed.Stat(ctx, "job")), ErrFailedPrecondition)
}

func TestBatches(t *testing.T) {
	t.Parallel()
	ctx := background(t)
	c := sharedClient(t, "memory")
	must(c.Prepare(ctx, "unpack", ""))(t)

	atomic := c.AtomicBatch()
	committed := atomic.Commit("layer", "unpack")
	left, right := atomic.Prepare("left", "layer"), atomic.Prepare("right", "layer")
	stat := atomic.Stat("left")
	refused(t, errorOf(stat.Get()), ErrFailedPrecondition)
	check(t, atomic.Send(ctx))
	check(t, errorOf(committed.Get()))
	if l, r := must(left.Get())(t), must(right.Get())(t); r.Fence <= l.Fence {
		t.Errorf("fences %d and %d", l.Fence, r.Fence)
	}
	if info := must(stat.Get())(t); info.Parent != "layer" {
		t.Errorf("stat in the batch %+v", info)
	}

	failing := c.AtomicBatch()
	first, second := failing.Remove("left"), failing.Remove("nobody")
	refused(t, failing.Send(ctx), ErrNotFound)
	refused(t, errorOf(first.Get()), ErrCancelled)
	refused(t, errorOf(second.Get()), ErrNotFound)
	check(t, errorOf(c.Stat(ctx, "left")))
	if failing.Refused() {
		t.Error("a batch with outcomes was refused as a whole")
	}

	plain := c.Batch()
	gone, kept := plain.Remove("left"), plain.Remove("nobody")
	refused(t, plain.Send(ctx), ErrNotFound)
	check(t, errorOf(gone.Get()))
	refused(t, errorOf(kept.Get()), ErrNotFound)
	refused(t, plain.Send(ctx), ErrFailedPrecondition)

	long := c.Batch()
	for i := range CallsMax + 1 {
		long.Prepare(fmt.Sprint("long-", i), "")
	}
	refused(t, long.Send(ctx), ErrInvalidArgument)
	if !long.Refused() {
		t.Error("a batch that was not sent was not refused")
	}
	refused(t, errorOf(c.Stat(ctx, "long-0")), ErrNotFound)
	check(t, c.Batch().Send(ctx))
}

func TestManyGoroutines(t *testing.T) {
	t.Parallel()
	const callers = 3000
	ctx := background(t)
	c := sharedClient(t, "memory")
	failures := make(chan error, callers)
	for i := range callers {
		go func() {
			key := fmt.Sprint("job-", i)
			_, err := c.Prepare(ctx, key, "")
			if err == nil {
				var info Info
				if info, err = c.Stat(ctx, key); err == nil && info.Name != key {
					err = fmt.Errorf("%q has the answer of %q", key, info.Name)
				}
			}
			if err == nil {
				err = c.Remove(ctx, key)
			}
			failures <- err
		}()
	}
	for range callers {
		check(t, <-failures)
	}
	statistics := c.Statistics()
	if statistics.Calls != 3*callers || statistics.Requests > callers || statistics.UnderWay != 0 {
		t.Errorf("statistics %+v", statistics)
	}
	infos, _, err := c.List(ctx, nil)
	if err != nil || len(infos) != 0 {
		t.Errorf("%d snapshots left, %v", len(infos), err)
	}
}

// Calls that are larger together than a body may be go in several requests; one alone that is too large is refused.
func TestLargeCalls(t *testing.T) {
	t.Parallel()
	ctx := background(t)
	c := sharedClient(t, "memory")
	labels := Labels{}
	for i := range LabelsMax {
		labels[fmt.Sprintf("%04d", i)] = string(make([]byte, 1000))
	}
	var wait sync.WaitGroup
	for i := range 24 {
		wait.Add(1)
		go func() {
			defer wait.Done()
			if _, err := c.Prepare(ctx, fmt.Sprint("large-", i), "", WithLabels(labels)); err != nil {
				t.Error(err)
			}
		}()
	}
	wait.Wait()
	if info := must(c.Stat(ctx, "large-23"))(t); len(info.Labels) != LabelsMax {
		t.Errorf("%d labels", len(info.Labels))
	}
	huge := Labels{"huge": string(make([]byte, BodyBytesMax))}
	refused(t, errorOf(c.Prepare(ctx, "huge", "", WithLabels(huge))), ErrInvalidArgument)
}

func TestWalk(t *testing.T) {
	t.Parallel()
	ctx := background(t)
	c := sharedClient(t, "memory")
	b := c.Batch()
	want := []string{}
	for i := range 300 {
		name := fmt.Sprintf("s-%03d", i)
		b.Prepare(name, "", WithLabels(Labels{"half": fmt.Sprint(i % 2)}))
		if i%2 == 0 {
			want = append(want, name)
		}
	}
	check(t, b.Send(ctx))
	for _, page := range []int{7, 1000} {
		found := []string{}
		for info, err := range c.Walk(ctx, []string{"labels.half==0,kind==active"}, WithPage(page)) {
			check(t, err)
			found = append(found, info.Name)
		}
		if !slices.Equal(found, want) {
			t.Errorf("in pages of %d found %v", page, found)
		}
	}
	for info, err := range c.Walk(ctx, nil, WithPage(1)) {
		check(t, err)
		if info.Name == "s-002" {
			break
		}
	}
	if statistics := c.Statistics(); statistics.UnderWay != 0 {
		t.Errorf("a walk that was broken off is still under way: %+v", statistics)
	}
}

// frozen stops a snapshotter until the end of the test, or until the function is called.
func frozen(t *testing.T, c *Client) (thaw func()) {
	t.Helper()
	status := must(c.Status(background(t)))(t)
	pid := int(status.Snapshotters[0].PID)
	check(t, syscall.Kill(pid, syscall.SIGSTOP))
	var once sync.Once
	thaw = func() { once.Do(func() { check(t, syscall.Kill(pid, syscall.SIGCONT)) }) }
	t.Cleanup(thaw)
	return thaw
}

func TestCancelAndDeadline(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, "[snapshotters.memory]\n")
	c := d.dial()
	base := background(t)
	must(c.Prepare(base, "there", ""))(t)
	thaw := frozen(t, c)

	ctx, cancel := context.WithCancel(base)
	failure := make(chan error)
	go func() { failure <- errorOf(c.Prepare(ctx, "taken-back", "")) }()
	for c.Statistics().Requests < 3 {
		time.Sleep(time.Millisecond) // Nothing tells: it paces the questions.
	}
	cancel()
	told := refused(t, <-failure, ErrCancelled)
	if !errors.Is(told, context.Canceled) || !told.InDoubt {
		t.Errorf("%v, in doubt %t", told, told.InDoubt)
	}

	ctx, cancel = context.WithTimeout(base, 50*time.Millisecond)
	defer cancel()
	told = refused(t, errorOf(c.Stat(ctx, "there")), ErrDeadlineExceeded)
	if !errors.Is(told, context.DeadlineExceeded) || told.InDoubt {
		t.Errorf("%v, in doubt %t", told, told.InDoubt)
	}
	told = refused(t, errorOf(c.Stat(ctx, "there")), ErrDeadlineExceeded)
	if told.InDoubt {
		t.Error("a call that was not sent is in doubt")
	}
	hasty := d.dial(WithTimeout(50 * time.Millisecond))
	must(hasty.Status(base))(t) // It is connected from here on.
	if told := refused(t, hasty.Remove(context.Background(), "there"), ErrDeadlineExceeded); !told.InDoubt {
		t.Error("a change without an answer is not in doubt")
	}

	// One caller of many gives up: the others have their answers.
	one, giveUp := context.WithCancel(base)
	failures := make(chan error, 20)
	for i := range 20 {
		go func() {
			ctx := base
			if i == 0 {
				ctx = one
			}
			failures <- errorOf(c.Stat(ctx, "there"))
		}()
	}
	for c.Statistics().UnderWay == 0 {
		time.Sleep(time.Millisecond)
	}
	giveUp()
	refused(t, <-failures, ErrCancelled)
	thaw()
	for range 19 {
		if err := <-failures; err != nil && !errors.Is(err, ErrNotFound) {
			t.Error(err)
		}
	}
	// The Cancel arrived before it began, or it was done: one or the other, and the books agree.
	check(t, c.Cleanup(base))
	prepared := 0
	for event, err := range c.Journal(base, 0) {
		check(t, err)
		if event.Verb == "prepare" && event.Key == "taken-back" {
			prepared++
		}
	}
	_, err := c.Stat(base, "taken-back")
	if prepared > 1 || (prepared == 1) != (err == nil) {
		t.Errorf("prepared %d times, then %v", prepared, err)
	}
}

func TestNobodyThere(t *testing.T) {
	t.Parallel()
	nobody := WithEndpoint(place(t) + "/router.sock")
	ctx := background(t)
	c := dial(t, nobody, WithSnapshotter("memory"), WithConnectTimeout(50*time.Millisecond))
	if told := refused(t, errorOf(c.Prepare(ctx, "a", "")), ErrUnavailable); told.InDoubt {
		t.Error("a call that was not sent is in doubt")
	}
	b := c.Batch()
	b.Prepare("a", "")
	refused(t, b.Send(ctx), ErrUnavailable)
	if !b.Refused() {
		t.Error("a batch that was not sent was not refused")
	}
	for _, err := range c.Walk(ctx, nil) {
		refused(t, err, ErrUnavailable)
	}
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	patient := dial(t, nobody, WithSnapshotter("memory"))
	if told := refused(t, errorOf(patient.Prepare(short, "a", "")), ErrDeadlineExceeded); told.InDoubt {
		t.Error("a call that was not sent is in doubt")
	}
	if statistics := patient.Statistics(); statistics.UnderWay != 0 || statistics.Unsent != 0 {
		t.Errorf("statistics %+v", statistics)
	}
}

// The broker is killed with kill -9 in the middle of much work: every call has its answer, and its effect once.
func TestKilledBroker(t *testing.T) {
	t.Parallel()
	const callers, each = 32, 60
	d := startDaemon(t, "[snapshotters.overlayfs]\n")
	ctx := background(t)
	c := d.dial(WithSnapshotter("overlayfs"), WithPatience(patienceOfTests), WithConnectTimeout(patienceOfTests))
	subscriber := must(c.Subscribe(ctx, WithSince(0)))(t)
	failures := make(chan error, callers)
	half := make(chan struct{}, callers)
	for caller := range callers {
		go func() {
			var err error
			for i := range each {
				key := fmt.Sprintf("job-%d-%d", caller, i)
				var made Mounts
				if made, err = c.Prepare(ctx, key, ""); err != nil {
					break
				}
				if err = c.Commit(ctx, key+"-made", key, WithFence(made.Fence)); err != nil {
					break
				}
				if i == each/3 {
					half <- struct{}{}
				}
			}
			failures <- err
		}()
	}
	for range callers / 4 {
		<-half
	}
	d.kill()
	d.start()
	for range callers {
		check(t, <-failures)
	}
	if statistics := c.Statistics(); statistics.Repeated == 0 {
		t.Errorf("nothing was repeated: %+v", statistics)
	}
	seen := map[string]int{}
	last := int64(0)
	for event, err := range subscriber.Events(ctx) {
		check(t, err)
		if event.Sequence <= last {
			t.Fatalf("event %d after %d", event.Sequence, last)
		}
		last = event.Sequence
		name := event.Key
		if event.Verb == "commit" {
			name = event.Info.Name
		}
		seen[event.Verb+" "+name]++
		if len(seen) == 2*callers*each {
			break
		}
	}
	for what, times := range seen {
		if times != 1 {
			t.Errorf("%s %d times", what, times)
		}
	}
	infos, _, err := c.List(ctx, []string{"kind==committed"})
	if err != nil || len(infos) != callers*each {
		t.Errorf("%d snapshots, %v", len(infos), err)
	}
	subscriber.Close()
}

// What the publisher drops for a slow subscriber comes from the journal, once and in order.
func TestDroppedEvents(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, "[publisher]\nsend_queue_max = 10\nheartbeat_ms = 100\n[snapshotters.memory]\n")
	c := d.dial()
	ctx := background(t)
	few := func(o *subscribeOptions) error { o.queued = 10; return nil }
	subscriber := must(c.Subscribe(ctx, few))(t)
	onlyRemoves := must(c.Subscribe(ctx, few, WithTopics(Topic("memory", "default", "remove"))))(t)
	const rounds, each = 8, 500
	for round := range rounds {
		for _, remove := range []bool{false, true} {
			b := c.Batch()
			for i := range each {
				key := fmt.Sprintf("s-%d-%d", round, i)
				if remove {
					b.Remove(key)
				} else {
					b.Prepare(key, "", WithLabels(Labels{"filler": string(make([]byte, 500))}))
				}
			}
			check(t, b.Send(ctx))
		}
	}
	for want := int64(1); want <= 2*rounds*each; want++ {
		if event := must(subscriber.Next(ctx))(t); event.Sequence != want {
			t.Fatalf("event %d, not %d", event.Sequence, want)
		}
	}
	for i := range int64(rounds * each) {
		want := i/each*2*each + each + i%each + 1
		if event := must(onlyRemoves.Next(ctx))(t); event.Sequence != want || event.Verb != "remove" {
			t.Fatalf("%s %d, not %d", event.Verb, event.Sequence, want)
		}
	}
	for _, one := range []*Subscriber{subscriber, onlyRemoves} {
		if statistics := one.Statistics(); statistics.Gaps == 0 {
			t.Errorf("nothing was lost: %+v", statistics)
		}
	}
	// Nothing comes any more, and a context ends the wait.
	short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	refused(t, errorOf(subscriber.Next(short)), ErrDeadlineExceeded)
	// One that is closed by somebody else ends the wait, too.
	failure := make(chan error)
	go func() { failure <- errorOf(subscriber.Next(ctx)) }()
	subscriber.Close()
	refused(t, <-failure, ErrFailedPrecondition)
}

// Where the journal no longer has what was missed a subscriber says so, and a mirror walks again.
func TestMirror(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, "[publisher]\nsend_queue_max = 10\nheartbeat_ms = 100\n"+
		"[snapshotters.overlayfs]\n[snapshotters.overlayfs.limits.journal]\nevents_max = 50\n")
	c := d.dial(WithSnapshotter("overlayfs"))
	ctx := background(t)
	must(c.Prepare(ctx, "base-making", ""))(t)
	check(t, c.Commit(ctx, "base", "base-making"))
	few := func(o *subscribeOptions) error { o.queued = 10; return nil }
	mirror := must(c.mirror(ctx, few))(t)
	defer mirror.Close()
	subscriber := must(c.Subscribe(ctx, few))(t)
	first := must(mirror.Next(ctx))(t)
	if first.Event != nil || first.Before != nil || mirror.Len() != 1 {
		t.Fatalf("first change %+v of %v", first, mirror.Snapshots())
	}
	must(c.Prepare(ctx, "job", "base"))(t)
	if change := must(mirror.Next(ctx))(t); change.Event == nil || change.Event.Key != "job" {
		t.Fatalf("change %+v", change)
	}

	// Across a restart, with changes that nobody heard of.
	d.kill()
	d.start()
	check(t, c.Commit(ctx, "layer", "job"))
	for change := range mirror.Changes(ctx) {
		if change.Event == nil {
			t.Fatalf("walked again, at %d", change.Sequence)
		}
		if _, found := mirror.Get("layer"); found {
			break
		}
	}

	// While it does not listen more happens than the journal keeps.
	for range 6 {
		b := c.Batch()
		for i := range 1000 {
			b.Update("layer", Labels{"n": fmt.Sprint(i), "filler": string(make([]byte, 2000))})
		}
		check(t, b.Send(ctx))
	}
	must(c.View(ctx, "last", "layer"))(t)
	refuses := func() error {
		for _, err := range subscriber.Events(ctx) {
			if err != nil {
				return err
			}
		}
		return nil
	}
	if told := refused(t, refuses(), ErrOutOfRange); told.Details["oldest"] == nil || told.Details["since"] == nil {
		t.Errorf("details %v", told.Details)
	}
	walked := false
	for change, err := range mirror.Changes(ctx) {
		check(t, err)
		if change.Event == nil {
			walked = true
			if len(change.Before) == 0 {
				t.Error("a walk that was not the first has nothing before it")
			}
		}
		if _, found := mirror.Get("last"); found {
			break
		}
	}
	if !walked {
		t.Error("did not walk again")
	}
	infos, _, err := c.List(ctx, nil)
	check(t, err)
	if got := mirror.Snapshots(); fmt.Sprint(got) != fmt.Sprint(infos) {
		t.Errorf("mirror %v, not %v", got, infos)
	}
}

// What a broker refuses it refuses whatever client asks: the vectors, as they are, on a bare socket.
func TestVectorsThatAreRefused(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, "[snapshotters.memory]\n")
	zctx := must(zmq.NewContext())(t)
	socket := must(zctx.NewSocket(zmq.DEALER))(t)
	defer func() { _ = zctx.Term() }()
	defer func() { _ = socket.Close() }()
	check(t, errors.Join(socket.SetLinger(0), socket.SetRcvtimeo(patienceOfTests), socket.Connect(d.dial().Endpoint())))
	for i, v := range golden(t).Refused {
		_, err := socket.SendMessage(requestVersion, []byte{byte(i + 1)}, "memory", v.body(t))
		check(t, err)
		frames := must(socket.RecvMessageBytes(0))(t)
		id, last, body, ok := replyFrames(frames)
		if !ok || !last || id != string(rune(i+1)) {
			t.Fatalf("%s: %x", v.Name, frames)
		}
		part := must(decode(body, (*reader).reply, "reply"))(t)
		var told *Error
		if v.Refuses == "request" {
			told = part.error
		} else if len(part.outcomes) == 1 {
			told = part.outcomes[0].error
		}
		if told == nil || string(told.Code) != v.Error {
			t.Errorf("%s: %v in %+v, not %s", v.Name, told, part, v.Error)
		}
	}
}
