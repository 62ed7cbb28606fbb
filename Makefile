# mmrepl_bgw: trigger-based multi-master replication, carried by background workers
#
#   make                  build against the PostgreSQL that $(PG_CONFIG) names
#   make install          install into that PostgreSQL
#   make check            build, install privately below tmp_check/, run every test; as root or as anybody
#   make check TESTS=...  the same with only the named test files, e.g. TESTS="test/sql/pairs.sql t/020_worker.pl"
#   make check-long       the tests plus t/long/*.pl, with MMREPL_LONG=1
#   make fault-library    the same library with fault points, for the tests in t/fault
#   make check-frames check-includes check-style     the static checks, see .ci/README.md
#   make check-matrix     the tests on newer PostgreSQL majors, in chroots
#   make check-fresh      check and demo in a fresh minimal system
#   make demo             show replication between throw-away servers; demo-up and demo-down keep them running
#   make bench            measure all workloads against other systems, see bench/README.md; bench-w1a and so on for one
#   make bench-deps       install those systems, as far as the distribution has them
#   make bench-report     the tables of BENCH_DIRS; BENCH_PUBLISH=1 makes them those of doc/benchmarks.md
#   make format           lay the sources out with clang-format

EXTENSION    = mmrepl_bgw
MODULE_big   = mmrepl_bgw
PGFILEDESC   = "mmrepl_bgw - multi-master replication"

version     := $(shell sed -n "s/^default_version *= *'\(.*\)'/\1/p" $(EXTENSION).control)
sources     := $(sort $(wildcard src/*.cpp src/*/*.cpp))
headers     := $(sort $(wildcard include/mmrepl/*.hpp include/mmrepl/*/*.hpp src/*.hpp src/*/*.hpp))

OBJS         = $(sources:.cpp=.o)
DATA         = $(wildcard sql/$(EXTENSION)--*--*.sql)
DATA_built   = sql/$(EXTENSION)--$(version).sql
EXTRA_CLEAN  = .build-flags .fault tmp_check tmp_demo output_iso $(fault_objects)

# The library with fault points (see include/mmrepl/fault.hpp) shares every object in which none is.
fault_library = .fault/$(MODULE_big).so
fault_sources := $(shell grep -lE 'MMREPL_(FAULT|CRASH|IN_TEST)' $(sources))
fault_objects = $(fault_sources:.cpp=.fault.o)

PG_CONFIG   ?= pg_config
PGXS        := $(shell $(PG_CONFIG) --pgxs 2>/dev/null)

# The tests.  The wildcards make it impossible to forget one.
REGRESS      = $(sort $(patsubst test/sql/%.sql,%,$(wildcard test/sql/*.sql)))
ISOLATION    = $(sort $(patsubst test/specs/%.spec,%,$(wildcard test/specs/*.spec)))
TAP_TESTS    = 1

# `make installcheck` is ours as well: it tests what is installed, on a server of its own.
NO_INSTALLCHECK = 1

project_goals = check check-long installcheck demo demo-up demo-down bench

ifeq (,$(wildcard $(PGXS)))

# PostgreSQL's build system is not on this machine yet.  The goals that may install packages do so and start over; the
# static checks that only read the sources work; everything else says what is missing.

.PHONY: $(project_goals)
$(project_goals):
	scripts/install-deps
	$(MAKE) $@

.PHONY: all install check-frames
.DEFAULT_GOAL := all
all install check-frames:
	@echo "$(PG_CONFIG) --pgxs names no file: run scripts/install-deps, or set PG_CONFIG" >&2
	@exit 1

else

# The language: C++ in plain frames, that is without exceptions, destructors, static constructors or the C++ runtime.
WERROR      ?= -Werror
PG_CXXFLAGS  = -std=gnu++20 -fno-exceptions -fno-rtti -fno-threadsafe-statics -fvisibility=hidden \
	-Wall -Wextra $(WERROR) -Wno-register -Wno-clobbered -Wno-missing-field-initializers $(clang_flags)
clang_flags  = $(if $(findstring clang,$(shell $(CXX) --version)),-Wno-unknown-warning-option)

# PostgreSQL's headers are system headers to us, so that the warnings are about our own code.
PG_CPPFLAGS  = -Iinclude -isystem $(shell $(PG_CONFIG) --includedir-server) -isystem $(shell $(PG_CONFIG) --includedir)
SHLIB_LINK_INTERNAL = $(libpq)

# Nothing of the C++ runtime is used, and so it is not linked, unless a distribution's flags ask for its assertions.
SHLIB_LINK  += -Wl,--as-needed -lstdc++

# The stock dependency rules; many packages of PostgreSQL have them switched off.
override autodepend = yes

include $(PGXS)

# The stock rule for bitcode, which is clang's, does not pass PG_CXXFLAGS.
BITCODE_CXXFLAGS += $(PG_CXXFLAGS) -Wno-unknown-warning-option

$(DATA_built): sql/$(EXTENSION).sql
	cp $< $@

# Objects made by another compiler, for another server or with other flags are made again.
build_flags := $(shell $(PG_CONFIG) --version) $(CXX) $(CXXFLAGS) $(CPPFLAGS) $(with_llvm)
.build-flags: FORCE
	@echo '$(build_flags)' | cmp -s - $@ || echo '$(build_flags)' > $@
$(OBJS) $(OBJS:.o=.bc): .build-flags Makefile
.PHONY: FORCE

.PHONY: fault-library install-fault
fault-library: $(fault_library)
$(fault_library): $(filter-out $(fault_sources:.cpp=.o),$(OBJS)) $(fault_objects)
	@mkdir -p $(@D)
	$(LINK.shared) -o $@ $^ $(LDFLAGS) $(LDFLAGS_SL) $(SHLIB_LINK)
$(fault_objects): %.fault.o: %.cpp $(headers) .build-flags Makefile
	$(COMPILE.cc) -DMMREPL_FAULT_POINTS -o $@ $<

# Only ever into a private copy of PostgreSQL.
install-fault: install $(fault_library)
	$(INSTALL_SHLIB) $(fault_library) '$(DESTDIR)$(pkglibdir)/$(MODULE_big).so'

# What scripts need to know about this build.
jobs         = $(if $(findstring jobserver,$(MAKEFLAGS)),,-j$(or $(MMREPL_JOBS),2))
script_env   = PG_CONFIG='$(PG_CONFIG)' MAKE='$(MAKE)' REGRESS='$(REGRESS)' ISOLATION='$(ISOLATION)' TESTS='$(TESTS)'

# Each test goal installs below tmp_check/ and leaves the machine's PostgreSQL alone; installcheck tests what is installed
# in it.  PGXS has a rule for check as well, which only prints that there is none: it prints into the void.
check: run-check
check: private SHELL = true

.PHONY: run-check check-long installcheck
run-check: deps
	+$(MAKE) $(jobs) all fault-library
	+$(script_env) scripts/run-tests

check-long: deps
	+$(MAKE) $(jobs) all fault-library
	+$(script_env) MMREPL_LONG=1 scripts/run-tests

installcheck:
	+$(script_env) scripts/run-tests --installed

# The demo needs the extension in a PostgreSQL: the machine's if we may write there, else a private copy of it.
.PHONY: demo demo-up demo-down
demo demo-up: deps
	+$(MAKE) $(jobs) all
	+$(script_env) scripts/with-install scripts/demo $(patsubst demo-%,%,$(@:demo=demo-run))
demo-down:
	$(script_env) scripts/with-install --again scripts/demo down

# BENCH_SYSTEMS and BENCH_WORKLOADS are lists with commas; the other knobs are in the environment, see bench/run.
workloads    = $(patsubst bench/workloads/%.sh,bench-%,$(wildcard bench/workloads/*.sh))
.PHONY: bench $(workloads)
bench $(workloads): deps
	+$(MAKE) $(jobs) all
	+$(script_env) bench/run $(addprefix --systems=,$(BENCH_SYSTEMS)) $(addprefix --workloads=,$(patsubst bench-%,%,$(@:bench=$(BENCH_WORKLOADS))))

.PHONY: deps
deps:
	@scripts/install-deps

.PHONY: check-frames
check-frames:
	+$(MAKE) $(jobs) all
	COMPILE='$(CXX) $(CXXFLAGS) $(CPPFLAGS) -c' JOBS='$(or $(MMREPL_JOBS),2)' .ci/check_frames $(shlib) $(sources)

endif # PGXS

.PHONY: bench-deps bench-report
bench-deps:
	scripts/install-deps --bench
bench-report:
	bench/report $(if $(BENCH_PUBLISH),--publish) $(or $(BENCH_DIRS),$(lastword $(sort $(wildcard bench/results/2*))))

.PHONY: check-includes check-spec check-style format check-matrix check-fresh
check-includes:
	.ci/check_includes

check-spec:
	doc/spec/check

CLANG_FORMAT ?= $(shell command -v clang-format-14 || echo clang-format)
check-style:
	$(CLANG_FORMAT) --dry-run -Werror $(sources) $(headers) </dev/null

format:
	$(CLANG_FORMAT) -i $(sources) $(headers)

# MATRIX names what to run in: 17, 18, or both.
check-matrix:
	.ci/chroot $(or $(MATRIX),17 18)

check-fresh:
	.ci/chroot fresh
