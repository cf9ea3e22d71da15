import asyncio
import json
import sys

import nats


async def main():
    nc = await nats.connect("nats://127.0.0.1:4222")
    query = {"prompt": " ".join(sys.argv[1:]) or "What is the capital of France?"}
    reply = json.loads((await nc.request("calm.query", json.dumps(query).encode(), timeout=120)).data)
    print(reply["text"] if reply["type"] == "answer.v1" else f"{reply['code']}: {reply['message']} {reply['remedy']}")
    await nc.close()


asyncio.run(main())
