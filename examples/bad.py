import asyncio
import json

import nats


async def main():
    nc = await nats.connect("nats://127.0.0.1:4222")
    bad = [
        {"prompt": 5},
        {"prompt": "Hi", "model": "gpt-9"},
        {"prompt": ""},
        {"prompt": "x" * 2**21},
        {"prompt": "word " * 3000},
    ]
    for query in bad:
        reply = json.loads((await nc.request("calm.query", json.dumps(query).encode(), timeout=60)).data)
        print(f"{reply['code']}: {reply['message']} -> {reply['remedy']}")
    await nc.close()


asyncio.run(main())
