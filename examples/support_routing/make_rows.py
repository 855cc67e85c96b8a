"""Write the rows of the example task: support tickets of an imaginary software company and the queue each belongs to.

`python make_rows.py` writes train.jsonl and test.jsonl beside this file, the same ones every time. No ticket is in both.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

TRAIN, TEST, SEED = 200, 300, 7

PRODUCTS = ["Harbor", "Lumen", "Quill", "Tandem", "Orbit"]
WHO = ["our team", "a colleague", "my manager", "one of our clients", "the whole office", "a new hire", "our intern", "the night shift"]
WHEN = ["since this morning", "since the last update", "for two days", "since Friday", "again", "all week", "after lunch", "since we moved office"]

QUEUES = {
    "ACC-10": [
        "{who} can not log in to {product} {when}",
        "the password reset mail for {product} never arrives {when}",
        "two factor codes are rejected by {product} {when}",
    ],
    "BIL-20": [
        "we were charged twice for {product} {when}",
        "the invoice of {who} for {product} shows the wrong VAT number",
        "our card was declined when renewing {product} {when}",
    ],
    "NET-30": [
        "{product} is very slow {when} for {who}",
        "the connection to {product} drops every few minutes {when}",
        "{who} gets a timeout when opening {product} over VPN",
    ],
    "BUG-40": [
        "{product} crashes when {who} clicks on save",
        "the export button of {product} does nothing {when}",
        "{product} shows a blank screen {when}",
    ],
    "DAT-50": [
        "please restore the folder that {who} deleted in {product}",
        "records are missing in {product} {when}",
        "can you move the {product} data of {who} to the EU region",
    ],
    "ORD-60": [
        "we want to buy ten more seats of {product} for {who}",
        "please send {who} a quote for {product}",
        "can {who} get a trial of {product}",
    ],
    "HOW-70": [
        "how do I share a report in {product} with {who}",
        "where can {who} change the language of {product}",
        "how can {who} set up a reminder in {product}",
    ],
    "SEC-80": [
        "{who} received a phishing mail that pretends to be {product}",
        "we see unknown logins to {product} {when}",
        "an API key of {product} was leaked by {who}",
    ],
}


def tickets() -> list[dict[str, str]]:
    """Every ticket that the patterns give, once."""
    found = {}
    for queue, patterns in QUEUES.items():
        for pattern in patterns:
            for product in PRODUCTS:
                for who in WHO:
                    for when in WHEN:
                        found[pattern.format(product=product, who=who, when=when)] = queue
    return [{"input": text, "target": queue} for text, queue in sorted(found.items())]


def main() -> None:
    draw = random.Random(SEED)
    by_queue = {queue: [row for row in tickets() if row["target"] == queue] for queue in QUEUES}
    rows = [draw.choice(by_queue[draw.choice(list(QUEUES))]) for _ in range(4 * (TRAIN + TEST))]
    distinct = list({row["input"]: row for row in rows}.values())[: TRAIN + TEST]
    for name, part in (("train", distinct[:TRAIN]), ("test", distinct[TRAIN:])):
        lines = [json.dumps(row) for row in part]
        (Path(__file__).parent / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
