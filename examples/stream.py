import asyncio
import json
import sys

import nats


async def main():
    nc = await nats.connect("nats://127.0.0.1:4222")
    inbox = nc.new_inbox()
    replies = await nc.subscribe(inbox)
    query = {"prompt": " ".join(sys.argv[1:]) or "Tell me about rain.", "stream": True}
    await nc.publish("calm.query", json.dumps(query).encode(), reply=inbox)
    async for message in replies.messages:
        reply = json.loads(message.data)
        if reply["type"] != "chunk.v1":
            print(f"\n[{reply['type']}] {reply.get('model') or reply.get('message')}")
            break
        print(reply["text"], end="", flush=True)
    await nc.close()


asyncio.run(main())
