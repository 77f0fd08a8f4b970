#!/usr/bin/env bash
# From an empty environment to a served prompt: bash examples/speedrun.sh
#
# It makes a folder `speedrun/` with a virtual environment and some rows. It
# trains a prompt of 20 tokens on the model that comes with ptune, evaluates it,
# predicts with it, exports it for PEFT, and serves it. It takes about five
# minutes on two CPU cores, mostly for the installation. Expect an accuracy of
# about 95 on the test rows.
#
#   STEPS=600    training steps
#   PYTHON=...   an interpreter with ptune, to skip the installation
#   SERVE=1      serve the prompt at the end, on port 8000
set -euo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p speedrun && cd speedrun

# ---------------------------------------------------------------- environment
if [ -z "${PYTHON:-}" ]; then
  python3 -m venv venv
  venv/bin/pip install --quiet "$checkout[serve]"
  PYTHON=$PWD/venv/bin/python
fi
ptune() { "$PYTHON" -m ptune.cli "$@"; }

# ----------------------------------------------------------------------- data
# Generated reviews. To use your own data, put three files here, and name their
# columns below.
"$PYTHON" - <<'ROWS'
import csv

from ptune.tasks import generated_text

for seed, (split, count) in enumerate(
  [('train', 2000), ('dev', 200), ('test', 400)]
):
  with open(f'{split}.csv', 'w', newline='') as file:
    writer = csv.writer(file)
    writer.writerow(['text', 'label'])
    writer.writerows(generated_text.reviews(seed, count))
ROWS

# ---------------------------------------------------------------------- train
ptune train --base=ptune://tiny --train=train.csv --validation=dev.csv \
  --inputs='{text}' --targets='{label}' --labels=negative,positive \
  --method=from_class_labels --prompt_length=20 --steps="${STEPS:-600}" \
  --model_dir=run

# ------------------------------------------------------------------- evaluate
ptune eval run --test=test.csv

# -------------------------------------------------------------------- predict
echo 'we both find it so insightful' | ptune infer run -

# ------------------------------------------------------------ export for PEFT
ptune export run --output=for_peft --overwrite
ls for_peft

# ---------------------------------------------------------------------- serve
if [ -n "${SERVE:-}" ]; then
  ptune serve run
fi
