"""`translora transfer` as a Ray job: ray job submit --working-dir . -- python jobs/transfer.py KIT --target REF --out RUN ..."""

import sys

from translora_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["transfer", *sys.argv[1:]]))
