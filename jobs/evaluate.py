"""`translora evaluate` as a Ray job: ray job submit --working-dir . --entrypoint-num-gpus 1 -- python jobs/evaluate.py RUN --data ..."""

import sys

from translora_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
