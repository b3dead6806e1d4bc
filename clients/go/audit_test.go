package snapbroker

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// What is wrong with a real store is told, mended only where that is asked for, and told of by why.
func TestAuditRepairAndWhy(t *testing.T) {
	t.Parallel()
	ctx := background(t)
	d := startDaemon(t, "[snapshotters.native]\n")
	c := d.dial(WithSnapshotter("native"))
	must(c.Prepare(ctx, "making", ""))(t)
	check(t, c.Commit(ctx, "base", "making"))
	made := must(c.Prepare(ctx, "job", "base"))(t)
	for page, err := range c.AuditPages(ctx) {
		check(t, err)
		if len(page.Findings) > 0 || page.Looked == 0 || page.next != "" {
			t.Errorf("%+v", page)
		}
	}
	status := must(c.Status(ctx))(t)
	left := filepath.Join(status.Snapshotters[0].Root, "snapshots", "50000")
	check(t, os.Mkdir(left, 0o700))
	check(t, os.Chmod(filepath.Join(status.Snapshotters[0].Root, "trash"), 0o755))
	told := func(given ...RepairOption) (kinds []string) {
		var one []RepairOption
		for finding, err := range c.Repair(ctx, append(append(one, given...), WithPage(1))...) {
			check(t, err)
			if finding.Kind == "trash" {
				continue // Not yet deleted.
			}
			if finding.Severity != "warning" || finding.Repair == "" || finding.Failure != "" ||
				finding.Mended != (len(given) > 0) {
				t.Errorf("%+v", finding)
			}
			kinds = append(kinds, finding.Kind)
		}
		slices.Sort(kinds)
		return kinds
	}
	want := []string{"leftover", "mode"}
	var found []string
	for finding, err := range c.Audit(ctx, WithProgress(func(Progress) {})) {
		check(t, err)
		found = append(found, finding.Kind)
		if finding.Kind == "leftover" && (finding.ID != 50000 || finding.Path != left) {
			t.Errorf("%+v", finding)
		}
	}
	slices.Sort(found)
	if !slices.Equal(found, want) {
		t.Errorf("an audit finds %v", found)
	}
	for _, given := range [][]RepairOption{nil, {WithExecute()}} {
		if got := told(given...); !slices.Equal(got, want) {
			t.Errorf("a repair tells %v", got)
		}
	}
	if got := told(); len(got) > 0 {
		t.Errorf("%v is left", got)
	}

	why := must(c.Why(ctx, "base"))(t)
	if why.Info == nil || why.Info.Kind != Committed || why.Broken || why.ChildrenCount != 1 ||
		!slices.Equal(why.Children, []string{"job"}) || why.ID == 0 {
		t.Errorf("base: %+v", why)
	}
	check(t, c.Remove(ctx, "job", WithFence(made.Fence)))
	if why = must(c.Why(ctx, "job"))(t); why.Info != nil || len(why.Events) != 2 || why.Events[0].Verb != "remove" ||
		why.Events[1].Sequence != made.Fence || why.Oldest != 1 {
		t.Errorf("job: %+v", why)
	}
	refused(t, errorOf(c.Why(ctx, "\xff")), ErrInvalidArgument)
	for _, err := range c.Audit(ctx, WithPage(0)) {
		refused(t, err, ErrInvalidArgument)
	}
}

// An audit goes on behind the last page when the credit is used, tells progress, and ends at the broker when it is left.
func TestAuditInPages(t *testing.T) {
	f := newFakeRouter(t)
	c := f.dial()
	ctx := background(t)
	page := func(next string, kinds ...string) outcome {
		answer := AuditPage{next: next, Looked: int64(len(kinds))}
		for _, kind := range kinds {
			answer.Findings = append(answer.Findings, Finding{Kind: kind, Severity: "note"})
		}
		return outcome{ok: body((*writer).auditPage, answer)}
	}
	type told struct {
		kinds []string
		err   error
	}
	done := make(chan told)
	progressed := make(chan Progress, 1)
	run := func(ctx context.Context, most int) {
		var all told
		for finding, err := range c.Audit(ctx, WithPage(2), WithProgress(func(p Progress) { progressed <- p })) {
			if all.err = err; err == nil {
				all.kinds = append(all.kinds, finding.Kind)
			}
			if len(all.kinds) == most {
				break
			}
		}
		done <- all
	}
	go run(ctx, 100)
	r := f.next()
	if one := r.calls[0]; one.verb != verbAudit || one.after != "" || one.page != 2 || one.credit != pagesAtOnce ||
		len(r.token) > 0 || r.timeoutMS == 0 {
		t.Errorf("asked %+v", r)
	}
	f.outcomes(r, false, outcome{progress: &Progress{Entries: 7}})
	if progress := <-progressed; progress.Entries != 7 {
		t.Errorf("progress %+v", progress)
	}
	f.outcomes(r, false, page("x", "a", "b"))
	f.outcomes(r, true, page("y"))
	r = f.next()
	if r.calls[0].after != "y" {
		t.Errorf("goes on behind %q", r.calls[0].after)
	}
	f.outcomes(r, true, page("", "c"))
	if all := <-done; all.err != nil || fmt.Sprint(all.kinds) != "[a b c]" {
		t.Errorf("%+v", all)
	}

	go run(ctx, 1)
	r = f.next()
	f.outcomes(r, false, page("x", "a"))
	if cancel := f.next(); cancel.calls[0].verb != verbCancel || string(cancel.calls[0].request) != string(r.id) {
		t.Errorf("an audit that was left: %+v", cancel)
	}
	<-done

	go run(ctx, 100)
	f.refuse(f.next(), unavailable)
	refused(t, (<-done).err, ErrUnavailable)

	// Without a deadline of the context an audit may take longer than other calls.
	go run(context.Background(), 100)
	r = f.next()
	if r.timeoutMS != auditTimeout.Milliseconds() {
		t.Errorf("timeout %d ms", r.timeoutMS)
	}
	f.outcomes(r, true, page(""))
	check(t, (<-done).err)
}
