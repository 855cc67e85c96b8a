"""`translora prepare` as a Ray job: ray job submit --working-dir . --entrypoint-num-gpus 1 -- python jobs/prepare.py TASK.yaml ..."""

import sys

from translora_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
