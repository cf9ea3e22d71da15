import json
import sys
import urllib.request

url = "http://127.0.0.1:8484/v1/chat/completions"
question = " ".join(sys.argv[1:]) or "What is the capital of France?"
body = {"model": "calm", "messages": [{"role": "user", "content": question}], "stream": True}
request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
with urllib.request.urlopen(request, timeout=120) as response:
    for line in response:
        data = line.decode().strip().removeprefix("data: ")
        if not data.startswith("{"):
            continue
        event = json.loads(data)
        if "error" in event:
            sys.exit(event["error"]["message"])
        for choice in event["choices"]:
            print(choice["delta"].get("content", ""), end="", flush=True)
        if "calm" in event:
            print(f"\n[{event['model']}, {event['calm']['energy']['joules']:.1f} J] {event['calm']['why']}")
