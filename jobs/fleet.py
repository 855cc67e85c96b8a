"""`translora fleet` as a Ray job: ray job submit --working-dir . -- python jobs/fleet.py jobs/fleet.example.yaml --resume"""

import sys

from translora_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["fleet", *sys.argv[1:]]))
