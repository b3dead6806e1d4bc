package main

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// load is a closed loop: every caller begins its next call when the one before has returned.
type load struct {
	callers int
	// operations is how many calls are made by all callers together; 0: as many as begin within duration.
	operations int
	duration   time.Duration
	// stop, where it is not nil, ends the load when it is closed, instead of the duration.
	stop <-chan struct{}
}

// latencies are the calls of one load, and the time from its beginning to the last answer.
type latencies struct {
	calls   []time.Duration
	elapsed time.Duration
}

// run makes the calls; each is given its caller and a number that no other call of this load has.
// The first error ends the load: a call that fails is not a measurement.
func (l load) run(call func(caller, number int) error) (latencies, error) {
	var (
		next    atomic.Int64
		failed  atomic.Pointer[error]
		group   sync.WaitGroup
		perCall = make([][]time.Duration, l.callers)
		begin   = time.Now()
		end     = begin.Add(l.duration)
	)
	for caller := range l.callers {
		group.Add(1)
		go func() {
			defer group.Done()
			for failed.Load() == nil {
				number := int(next.Add(1) - 1)
				started := time.Now()
				if l.over(number, started.After(end)) {
					return
				}
				if err := call(caller, number); err != nil {
					failed.CompareAndSwap(nil, &err)
					return
				}
				perCall[caller] = append(perCall[caller], time.Since(started))
			}
		}()
	}
	group.Wait()
	result := latencies{calls: slices.Concat(perCall...), elapsed: time.Since(begin)}
	if err := failed.Load(); err != nil {
		return result, *err
	}
	return result, nil
}

// over says whether call number is one too many.
func (l load) over(number int, late bool) bool {
	if l.stop != nil {
		select {
		case <-l.stop:
			return true
		default:
			return false
		}
	}
	if l.operations > 0 {
		return number >= l.operations
	}
	return late
}

// report sorts the latencies and takes the figures from them.
func (l latencies) report(o options) report {
	slices.Sort(l.calls)
	return report{
		Operation:  o.operation,
		Callers:    o.callers,
		Operations: len(l.calls),
		Seconds:    l.elapsed.Seconds(),
		Rate:       float64(len(l.calls)) / l.elapsed.Seconds(),
		P50:        l.quantile(0.50),
		P99:        l.quantile(0.99),
		Max:        l.quantile(1),
	}
}

// quantile is the nearest-rank quantile of the sorted calls, in milliseconds.
func (l latencies) quantile(fraction float64) float64 {
	if len(l.calls) == 0 {
		return 0
	}
	rank := min(int(fraction*float64(len(l.calls))), len(l.calls)-1)
	return float64(l.calls[rank]) / float64(time.Millisecond)
}
