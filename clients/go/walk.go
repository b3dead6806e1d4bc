package snapbroker

import (
	"context"
	"errors"
	"iter"
	"time"
)

// pages are those of one request. Closing them early tells the broker.
type pages struct {
	connection *connection
	stream     *stream
	report     func(Progress)
}

func (c *Client) ask(ctx context.Context, question *call) (*pages, error) {
	return c.askWithin(ctx, question, c.connection.timeout, nil)
}

// askWithin is ask with the timeout for a context without a deadline, and with who is told of progress.
func (c *Client) askWithin(
	ctx context.Context, question *call, timeout time.Duration, report func(Progress),
) (*pages, error) {
	target, err := c.Snapshotter(ctx)
	if err != nil {
		return nil, err
	}
	body, err := question.encode()
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, ended(ctx, false, false)
	}
	p := &pages{c.connection, newStream(target, c.namespace, timeout, body), report}
	if report != nil {
		p.stream.report = make(chan Progress, 1)
	}
	if deadline, ok := ctx.Deadline(); ok {
		p.stream.timeout, p.stream.grace = max(time.Until(deadline), time.Millisecond), contextGrace
	}
	if err := c.connection.launchStream(p.stream); err != nil {
		return nil, err
	}
	return p, nil
}

// sent says whether the broker was there to be asked.
func (p *pages) sent() bool {
	p.connection.mu.Lock()
	defer p.connection.mu.Unlock()
	return p.stream.sent
}

// next answers the next page, still encoded; nil at the end.
func (p *pages) next(ctx context.Context) ([]byte, error) {
	for {
		p.connection.mu.Lock()
		page, over, err := p.stream.take()
		p.connection.mu.Unlock()
		if err != nil {
			return nil, err
		}
		if page != nil || over {
			return page, nil
		}
		select {
		case <-p.stream.wake:
		case progress := <-p.stream.report:
			p.report(progress)
		case <-ctx.Done():
			sent := p.sent()
			p.close()
			return nil, ended(ctx, sent, false)
		}
	}
}

func (p *pages) close() {
	p.connection.mu.Lock()
	p.stream.unwanted = true
	p.connection.takeBackIfForsaken(p.stream)
	p.connection.mu.Unlock()
	p.connection.post()
}

// walker asks for the pages of a walk as they are used.
type walker struct {
	client  *Client
	filters []string
	page    int64
	after   string
	current *pages
}

// next answers the next page; where the walk broke off it is asked for behind the last one, as a request is repeated.
// Not ok at the end.
func (w *walker) next(ctx context.Context) (page WalkPage, ok bool, err error) {
	c := w.client.connection
	var again *repeats
	for {
		page, ok, err = w.pageOrEnd(ctx)
		if err == nil || !errors.Is(err, ErrUnavailable) {
			return page, ok, err
		}
		if again == nil {
			// Without a page asked for there was no broker to ask.
			if w.current == nil || !w.current.sent() || c.patience.limit == 0 {
				return page, false, err
			}
			again = newRepeats(c.patience, deadlineOf(ctx, c.patience.now(), c.timeout))
		}
		pause, more := again.pause(asError(err))
		if !more {
			return page, false, err
		}
		if err := sleep(ctx, pause); err != nil {
			return page, false, err
		}
		w.current = nil
	}
}

func (w *walker) pageOrEnd(ctx context.Context) (page WalkPage, ok bool, err error) {
	var body []byte
	for range 2 {
		if w.current == nil {
			question := &call{verb: verbWalk, filters: w.filters, after: w.after, page: w.page, credit: pagesAtOnce}
			if w.current, err = w.client.ask(ctx, question); err != nil {
				return page, false, err
			}
		}
		if body, err = w.current.next(ctx); err != nil {
			return page, false, err
		}
		if body != nil || w.after == "" {
			break
		}
		// The credit is used, and the last page had more behind it.
		w.current = nil
	}
	if body == nil {
		return page, false, nil
	}
	if page, err = decode(body, (*reader).walkPage, "page"); err != nil {
		return page, false, err
	}
	if page.next != "" && page.next <= w.after {
		return page, false, fault(CodeInternal, "the broker continues its walk at %.80q, though it was at %.80q before",
			page.next, w.after)
	}
	w.after = page.next
	return page, true, nil
}

func (w *walker) close() {
	if w.current != nil {
		w.current.close()
	}
}

// Walk gives out every snapshot that at least one of the filters matches, all without filters, in the order of the bytes
// of their names, asked for in pages as they are used. It ends with the first error. Snapshots may come and go while it
// lasts: for a state that can be kept up to date see WalkPages, List and Mirror.
//
// The grammar of filters is that of 1/SNBR section 5.10: `kind==committed,parent==base`, `labels."a.b/c"~=/^x/`.
func (c *Client) Walk(ctx context.Context, filters []string, given ...WalkOption) iter.Seq2[Info, error] {
	return func(yield func(Info, error) bool) {
		for page, err := range c.WalkPages(ctx, filters, given...) {
			if err != nil {
				yield(Info{}, err)
				return
			}
			for _, info := range page.Infos {
				if !yield(info, nil) {
					return
				}
			}
		}
	}
}

// WalkPages gives out the pages of a walk, with their sequences.
func (c *Client) WalkPages(ctx context.Context, filters []string, given ...WalkOption) iter.Seq2[WalkPage, error] {
	o := callOptions{page: pageDefault}
	for _, option := range given {
		option.applyWalk(&o)
	}
	return func(yield func(WalkPage, error) bool) {
		w := &walker{client: c, filters: filters, page: o.page}
		defer w.close()
		for {
			page, ok, err := w.next(ctx)
			if err != nil {
				yield(WalkPage{}, err)
				return
			}
			if !ok || !yield(page, nil) {
				return
			}
		}
	}
}

// List walks to the end. Events above sequence, applied in order, bring what it answers up to date.
func (c *Client) List(ctx context.Context, filters []string, given ...WalkOption) (infos []Info, sequence int64, err error) {
	first := true
	for page, err := range c.WalkPages(ctx, filters, given...) {
		if err != nil {
			return nil, 0, err
		}
		if first {
			sequence, first = page.Sequence, false
		}
		infos = append(infos, page.Infos...)
	}
	return infos, sequence, nil
}

func deadlineOf(ctx context.Context, now time.Time, timeout time.Duration) time.Time {
	if deadline, ok := ctx.Deadline(); ok {
		return deadline
	}
	return now.Add(timeout)
}

// sleep waits, or answers the context's end.
func sleep(ctx context.Context, pause time.Duration) error {
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ended(ctx, false, false)
	}
}
