import asyncio
import json
import sys

import nats


async def main():
    nc = await nats.connect("nats://127.0.0.1:4222")
    question = " ".join(sys.argv[1:]) or "What is the capital of France? (A) Rome (B) Oslo (C) Paris (D) Bern"
    query = {"prompt": question, "expect": {"kind": "choice", "of": ["A", "B", "C", "D"]}, "retries": 1}
    reply = json.loads((await nc.request("calm.query", json.dumps(query).encode(), timeout=120)).data)
    print(reply["reading"]["value"], "in", repr(reply["text"]), "by", reply["model"])
    await nc.close()


asyncio.run(main())
