"""Coverage-guided fuzzing: whatever bytes come in, only what the contract promises comes out.

`targets/` has one module a target: `one(data)` tries one input and raises what must not happen, `seeds()` are inputs to
begin with. `corpus/<target>/` has the inputs that reach everything reached so far, and those that once found something.
`python -m tests.fuzz` searches for more; `test_fuzz.py` tries each of them, and searches for a moment.
"""
