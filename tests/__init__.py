"""The suite; `conftest` says how its programs are compiled and run."""

# Most programs run a few times only: without XLA's newest emitters for loops
# they are compiled in half of the time.
QUICK_FLAGS = '--xla_cpu_use_fusion_emitters=false'
