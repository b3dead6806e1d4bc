package snapbroker

import (
	"context"
	"iter"
)

// auditor asks for the pages of an audit as they are used. It is not repeated: what was found is told, and whoever wants
// the rest asks again.
type auditor struct {
	client   *Client
	question call
	report   func(Progress)
	current  *pages
}

// next answers the next page; not ok at the end.
func (a *auditor) next(ctx context.Context) (page AuditPage, ok bool, err error) {
	for range 2 {
		if a.current == nil {
			question := a.question
			if a.current, err = a.client.askWithin(ctx, &question, auditTimeout, a.report); err != nil {
				return page, false, err
			}
		}
		body, err := a.current.next(ctx)
		if err != nil {
			return page, false, err
		}
		if body != nil {
			page, err = decode(body, (*reader).auditPage, "page")
			a.question.after = page.next
			return page, err == nil, err
		}
		if a.question.after == "" {
			break
		}
		// The credit is used, and the last page had more behind it.
		a.current = nil
	}
	return page, false, nil
}

func (a *auditor) pages(ctx context.Context) iter.Seq2[AuditPage, error] {
	return func(yield func(AuditPage, error) bool) {
		// A copy, so that the iterator may be used twice.
		a := *a
		defer func() {
			if a.current != nil {
				a.current.close()
			}
		}()
		for {
			page, ok, err := a.next(ctx)
			if err != nil {
				yield(AuditPage{}, err)
				return
			}
			if !ok || !yield(page, nil) {
				return
			}
		}
	}
}

func findings(pages iter.Seq2[AuditPage, error]) iter.Seq2[Finding, error] {
	return func(yield func(Finding, error) bool) {
		for page, err := range pages {
			if err != nil {
				yield(Finding{}, err)
				return
			}
			for _, finding := range page.Findings {
				if !yield(finding, nil) {
					return
				}
			}
		}
	}
}

// Audit holds everything the snapshotter keeps, in every namespace, against everything else, and gives out what is not
// as it must be, as it is found. It ends with the first error. Where the context has no deadline it may take an hour.
func (c *Client) Audit(ctx context.Context, given ...AuditOption) iter.Seq2[Finding, error] {
	return findings(c.AuditPages(ctx, given...))
}

// AuditPages gives out the pages of an audit, which also say how much was looked at.
func (c *Client) AuditPages(ctx context.Context, given ...AuditOption) iter.Seq2[AuditPage, error] {
	o := callOptions{page: pageDefault}
	for _, option := range given {
		option.applyAudit(&o)
	}
	return (&auditor{client: c, question: o.question(verbAudit), report: o.report}).pages(ctx)
}

// Repair is an audit whose findings say in Repair what would be done about them; WithExecute has it done before they
// are told.
func (c *Client) Repair(ctx context.Context, given ...RepairOption) iter.Seq2[Finding, error] {
	return findings(c.RepairPages(ctx, given...))
}

// RepairPages gives out the pages of a repair, as AuditPages.
func (c *Client) RepairPages(ctx context.Context, given ...RepairOption) iter.Seq2[AuditPage, error] {
	o := callOptions{page: pageDefault}
	for _, option := range given {
		option.applyRepair(&o)
	}
	return (&auditor{client: c, question: o.question(verbRepair), report: o.report}).pages(ctx)
}

func (o *callOptions) question(verb verb) call {
	return call{verb: verb, execute: o.execute, page: o.page, credit: pagesAtOnce}
}
