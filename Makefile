# SPDX-License-Identifier: LGPL-2.1-or-later
# Everything is built in the checkout: .venv from the lock files, victims under tests/victims/build.
# `make` lists what there is.

.DEFAULT_GOAL := help
SHELL := /bin/sh
.DELETE_ON_ERROR:

VERSION := $(shell sed -n "s/^version = \"\(.*\)\"/\1/p" pyproject.toml)

# ---------------------------------------------------------------------------------------------------------- the venv
# The first interpreter that is new enough and can make a venv. Debian puts ensurepip into python3-venv, so an
# interpreter without it is passed over. Overridden by `make PYTHON=...`.
CAN_VENV = import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON = $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c '$(CAN_VENV)' 2>/dev/null && { command -v $$python; break; }; done)

VENV := .venv
BIN := $(VENV)/bin
# wheels only: a source distribution would fetch build tools that no lock file names
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input \
	--require-hashes --only-binary :all: --no-deps

.PHONY: help venv demo test check unit unit-others unit-all lint bench fuzz kills random programs man lock dist install uninstall clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12
	@echo 'variables: PYTHON=, PYTEST_ARGS=, of fuzz, kills and random: N=, SEED=, and for install: DESTDIR=, PREFIX=$(PREFIX), SYSCONFDIR=$(SYSCONFDIR)'

$(BIN)/python:
	@python='$(PYTHON)'; if [ -z "$$python" ]; then \
		echo 'ckptd needs Python 3.11 or newer with the venv module. On Debian and Ubuntu:' >&2; \
		echo '    sudo apt-get update && sudo apt-get install -y python3-venv' >&2; exit 1; fi; \
	echo "building .venv with $$python"; "$$python" -m venv $(VENV)

# --no-build-isolation: the build back-end is the locked setuptools of the venv itself, nothing is downloaded
$(VENV)/.run: requirements.lock requirements-build.lock pyproject.toml | $(BIN)/python
	@$(PIP_INSTALL) -r requirements-build.lock
	@$(PIP_INSTALL) -r requirements.lock
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-index --no-deps \
		--no-build-isolation -e .
	@touch $@

$(VENV)/.test: requirements-test.lock $(VENV)/.run
	@$(PIP_INSTALL) -r requirements-test.lock
	@touch $@

venv: $(VENV)/.run  ## build .venv; then .venv/bin/ckptd and .venv/bin/ckptctl work

# ---------------------------------------------------------------------------------------------------- run and test
demo: $(VENV)/.run  ## checkpoint a live process tree, on a private bus, with progress
	@$(BIN)/ckptctl demo

test: $(VENV)/.test  ## all tests (what cannot run here is skipped and named; CKPTD_REQUIRE=... makes that a failure)
	$(BIN)/pytest -n 2 --dist worksteal $(PYTEST_ARGS)

check: lint unit  ## linters and unit tests: before each commit

unit: $(VENV)/.test  ## unit tests: no root, no bus, seconds
	$(BIN)/pytest -n 2 --dist worksteal tests/unit $(PYTEST_ARGS)

# each other interpreter gets a venv of its own under .cache; pyenv's shims are on PATH but answer only when asked right
PYENV_ROOT ?= $(HOME)/.pyenv
unit-others: $(VENV)/.test  ## unit tests on every other Python 3.11 to 3.14 found on PATH and under PYENV_ROOT
	@set -e; seen=$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	for python in python3.11 python3.12 python3.13 python3.14 '$(PYENV_ROOT)'/versions/3.1[1-4]*/bin/python3; do \
		version=$$("$$python" -c 'import sys, venv, ensurepip; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
		case " $$seen " in *" $$version "*) continue;; esac; seen="$$seen $$version"; \
		echo "== Python $$version"; \
		$(MAKE) --no-print-directory unit VENV=.cache/venv-$$version PYTHON="$$python"; \
	done

unit-all: unit unit-others  ## unit tests on this Python and every other

lint: $(VENV)/.test  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

kills: $(VENV)/.test  ## kill ckptd at N=1000 random moments of checkpoints and restores; SEED= repeats a run
	$(BIN)/python -m tests.kills --count $(or $(N),1000) $(if $(SEED),--seed $(SEED))

random: $(VENV)/.test  ## checkpoint and restore N=2000 random programs, as root, with USERS=1 those of users; SEED= repeats a run
	$(BIN)/python -m tests.generated --count $(or $(N),2000) $(if $(USERS),--user) $(if $(SEED),--seed $(SEED))

PROGRAMS := .cache/programs
$(PROGRAMS)/.ready: requirements-programs.lock | $(BIN)/python
	@$(BIN)/python -m venv $(PROGRAMS)
	@$(PROGRAMS)/bin/python -m pip install --quiet --disable-pip-version-check --no-input --require-hashes \
		--only-binary :all: --no-deps -r requirements-programs.lock
	@touch $@

# CONTRIBUTING.md names the packages that they need; one that is missing is a failure
programs: $(VENV)/.test $(PROGRAMS)/.ready  ## checkpoint and restore real programs that are too large for `make test`, as root
	CKPTD_REQUIRE=all $(BIN)/pytest -m heavy tests/programs $(PYTEST_ARGS)

bench: $(VENV)/.test  ## scan, checkpoints, restarts and calls: times, and MB/s beside a plain write(2) and read(2)
	$(BIN)/python -m tests.bench $(BENCH_ARGS)

fuzz: $(VENV)/.test  ## N=100000 crafted images and as many random messages, as root; SEED= repeats a run
	$(BIN)/python -m tests.fuzz --images $(or $(N),100000) --messages $(or $(N),100000) $(if $(SEED),--seed $(SEED))

man: $(VENV)/.run  ## man pages of docs/*.N.md below build/man; read one with `man -M build/man ckptctl`
	@$(MAKE_MAN) --into build/man $(MANUALS)

# ------------------------------------------------------------------------------------------------------- releasing
# uv resolves for every Python and platform at once, so one lock serves 3.11 to 3.14; no file names an index.
LOCK = .cache/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock'

PROGRAMS_OF_PYTHON = dask distributed gunicorn ipykernel joblib jupyter-client loky uvicorn

lock: $(BIN)/python  ## resolve the dependencies anew and write the lock files
	@test -x .cache/lock/bin/uv || { $(BIN)/python -m venv .cache/lock && .cache/lock/bin/python -m pip install --quiet uv; }
	@$(LOCK) pyproject.toml -o requirements.lock
	@$(LOCK) --all-extras pyproject.toml -o requirements-test.lock
	@printf '%s\n' $(PROGRAMS_OF_PYTHON) | $(LOCK) - -o requirements-programs.lock
	@sed -n 's/^requires = \["\(.*\)"\]/\1/p' pyproject.toml | $(LOCK) - -o requirements-build.lock

dist:  ## dist/ckptd-VERSION.tar.gz of the committed tree
	@mkdir -p dist
	@git archive --prefix=ckptd-$(VERSION)/ -o dist/ckptd-$(VERSION).tar.gz HEAD
	@echo dist/ckptd-$(VERSION).tar.gz

clean:  ## remove what the other targets built
	rm -rf .venv .cache build dist tests/victims/build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# ------------------------------------------------------------------------------------------------------ installing
PREFIX ?= /usr/local
SYSCONFDIR ?= /etc
UNITDIR = $(PREFIX)/lib/systemd
# dbus-daemon and dbus-broker read bus policy below /usr/share and /etc only; activation files also below /usr/local
POLICYDIR = $(if $(filter /usr,$(PREFIX)),/usr/share,$(SYSCONFDIR))/dbus-1/system.d
# polkitd reads actions here and nowhere else
ACTIONDIR = /usr/share/polkit-1/actions
LIBDIR = $(PREFIX)/lib/ckptd
DOCDIR = $(PREFIX)/share/doc/ckptd
MANDIR = $(PREFIX)/share/man
INTERFACES = $(wildcard dbus/org.ckptd1.*.xml)
# docs/ckptctl.1.md becomes man1/ckptctl.1. The converter needs nothing but .venv: markdown-it-py comes with rich
MANUALS = $(wildcard docs/*.[1-8].md)
MAN_PAGES = $(foreach page,$(MANUALS:docs/%.md=%),man$(patsubst .%,%,$(suffix $(page)))/$(page))
MAKE_MAN = $(BIN)/python docs/manpage.py --release $(VERSION)
# The system's own interpreter before any other: a service cannot rely on one in somebody's home.
INSTALL_PYTHON = $(shell for python in /usr/bin/python3 /usr/bin/python3.1[1-9] '$(PYTHON)'; do \
	"$$python" -c '$(CAN_VENV)' 2>/dev/null && { echo "$$python"; break; }; done)

# src:dst:mode rows of the plain files; install writes them, uninstall removes the same ones
FILES = \
	dbus/org.ckptd1.conf:$(POLICYDIR)/org.ckptd1.conf \
	dbus/org.ckptd1.service:$(PREFIX)/share/dbus-1/system-services/org.ckptd1.service \
	dbus/org.ckptd1.policy:$(ACTIONDIR)/org.ckptd1.policy \
	dbus/50-ckptd.rules:$(DOCDIR)/examples/50-ckptd.rules \
	dbus/user/org.ckptd1.service:$(PREFIX)/share/dbus-1/services/org.ckptd1.service \
	$(foreach xml,$(INTERFACES),$(xml):$(PREFIX)/share/dbus-1/interfaces/$(notdir $(xml))) \
	units/ckptd.service:$(UNITDIR)/system/ckptd.service \
	units/user/ckptd.service:$(UNITDIR)/user/ckptd.service \
	units/ckptd.tmpfiles.conf:$(PREFIX)/lib/tmpfiles.d/ckptd.conf \
	units/checkpoint-before-stop.conf:$(DOCDIR)/examples/checkpoint-before-stop.conf \
	ckptd/cli/completion/ckptctl.bash:$(PREFIX)/share/bash-completion/completions/ckptctl \
	ckptd/cli/completion/_ckptctl:$(PREFIX)/share/zsh/site-functions/_ckptctl \
	docs/architecture.md:$(DOCDIR)/architecture.md \
	docs/security.md:$(DOCDIR)/security.md \
	README.md:$(DOCDIR)/README.md \
	CHANGELOG.md:$(DOCDIR)/CHANGELOG.md \
	LICENSE:$(DOCDIR)/LICENSE
source_of = $(word 1,$(subst :, ,$(1)))
target_of = $(DESTDIR)$(word 2,$(subst :, ,$(1)))

# A venv without pip at LIBDIR holds the program and the locked wheels, so `python -m ckptd.worker.main` needs no
# PYTHONPATH; its python is a link to the system's, and no file in it names DESTDIR. The two programs are three-line scripts in PREFIX/bin.
install: $(VENV)/.run  ## install into DESTDIR with PREFIX (default /usr/local)
	@test -n '$(INSTALL_PYTHON)' || { echo 'no system Python 3.11 with venv: apt-get install -y python3-venv' >&2; exit 1; }
	rm -rf '$(DESTDIR)$(LIBDIR)'
	$(INSTALL_PYTHON) -m venv --without-pip --symlinks '$(DESTDIR)$(LIBDIR)'
	$(BIN)/python -m pip --python '$(DESTDIR)$(LIBDIR)/bin/python' install --quiet --disable-pip-version-check \
		--require-hashes --only-binary :all: --no-deps --no-compile -r requirements.lock
	find '$(DESTDIR)$(LIBDIR)/bin' -type f -delete
	@set -e; site=$$(echo '$(DESTDIR)$(LIBDIR)'/lib/python3.*/site-packages); \
	tar -c --exclude=__pycache__ --owner=0 --group=0 ckptd | tar -x --no-same-owner -C "$$site"; \
	sed -i '/^command/d' '$(DESTDIR)$(LIBDIR)/pyvenv.cfg'; \
	'$(DESTDIR)$(LIBDIR)/bin/python' -m compileall -q -s '$(DESTDIR)' "$$site"
	@install -d '$(DESTDIR)$(PREFIX)/bin'
	@for program in ckptd:ckptd.daemon ckptctl:ckptd.cli.main; do \
		printf '#!%s -I\nimport sys\nfrom %s import main\nsys.exit(main())\n' \
			'$(LIBDIR)/bin/python' "$${program#*:}" > '$(DESTDIR)$(PREFIX)/bin/'"$${program%%:*}"; \
		chmod 755 '$(DESTDIR)$(PREFIX)/bin/'"$${program%%:*}"; \
	done
	@$(foreach row,$(FILES),install -D -m 644 '$(call source_of,$(row))' '$(call target_of,$(row))' && ) true
	@$(MAKE_MAN) --into '$(DESTDIR)$(MANDIR)' $(MANUALS)
	@sed -i -e 's|/usr/bin/ckpt|$(PREFIX)/bin/ckpt|g' -e 's|/usr/share/doc/ckptd|$(DOCDIR)|g' \
		$(foreach row,$(filter units/% dbus/%,$(FILES)),'$(call target_of,$(row))')
	@test -n '$(DESTDIR)' || ! [ -d /run/systemd/system ] || systemctl daemon-reload
	@echo 'installed below $(DESTDIR)$(PREFIX)'

uninstall:  ## remove what install put there; images stay
	rm -rf '$(DESTDIR)$(LIBDIR)' '$(DESTDIR)$(DOCDIR)'
	rm -f '$(DESTDIR)$(PREFIX)/bin/ckptd' '$(DESTDIR)$(PREFIX)/bin/ckptctl' \
		$(foreach row,$(FILES),'$(call target_of,$(row))') $(MAN_PAGES:%='$(DESTDIR)$(MANDIR)/%')
