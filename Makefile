.PHONY: demo test lint bench fuzz soak
demo: ; @.ci/setup && .venv/bin/python benchmarks/demo.py
test: ; @.ci/setup dev && .venv/bin/pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)
lint: ; @.ci/setup dev && .ci/lint
bench: ; @.ci/setup dev && .venv/bin/python -m benchmarks $(ARGS)
fuzz: ; @.ci/setup dev && .venv/bin/python -m tests.fuzz --seconds $(or $(SECONDS),300) $(ARGS) && .venv/bin/pytest --hypothesis-profile=fuzz --timeout=0 -k "garbage or damaged or any or whatever or comes" clients/python/tests tests/test_filters.py
soak: ; @.ci/setup dev && .venv/bin/python -m tests.soak --minutes $(or $(MINUTES),60) $(ARGS)
