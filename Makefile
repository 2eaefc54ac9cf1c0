# What a contributor types; .ci/run does the same in a fresh virtual environment.
.PHONY: format lint test test-quick test-gpu bench
format:
	ruff format .
	ruff check --fix .
lint:
	ruff format --check .
	ruff check .
	mypy
test:
	python -m pytest --numprocesses=auto
test-quick: # what needs no launch of several processes
	python -m pytest --numprocesses=auto tests/config tests/data tests/model tests/heads tests/test_house.py tests/test_cli.py tests/test_docs.py
test-gpu:
	python -m pytest -m gpu tests/gpu
bench:
	medusa-ds bench --stage 1 --heads 3 --sequence 1024 --impl ours,original
