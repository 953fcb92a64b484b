"""In a host's environment: cancels a prompt over HTTP as the browser does, once one of its nodes has reported a step,
and queues another one. Prints what the host said as one line of JSON.

python cancelling.py HOST_ROOT URL NODE LONG SHORT        the node's id, the prompts as JSON
"""

import asyncio
import json
import sys

import aiohttp

URL, NODE, LONG, SHORT = *sys.argv[2:4], *map(json.loads, sys.argv[4:])
ENDS = ("execution_interrupted", "execution_error", "execution_success")


async def main() -> dict:
    async with aiohttp.ClientSession(URL) as session, session.ws_connect("/ws?clientId=me") as socket:

        async def submit(prompt: dict) -> str:
            async with session.post("/prompt", json={"prompt": prompt, "client_id": "me"}) as answer:
                return (await answer.json())["prompt_id"]

        async def next_of(prompt_id: str, *kinds: str) -> dict:
            async for message in socket:
                said = json.loads(message.data) if message.type is aiohttp.WSMsgType.TEXT else {}  # else a preview
                if said.get("type") in kinds and said["data"].get("prompt_id") == prompt_id:
                    return said
            raise RuntimeError(f"the host closed the connection before {' or '.join(kinds)}")

        cancelled = await submit(LONG)
        while (step := await next_of(cancelled, "progress"))["data"]["node"] != NODE:
            pass
        await (await session.post("/interrupt", json={})).read()
        end = await next_of(cancelled, *ENDS)
        again = await next_of(await submit(SHORT), *ENDS)
        return {"step": step["data"], "end": end["type"], "node": end["data"].get("node_type"), "again": again["type"]}


print(json.dumps(asyncio.run(asyncio.wait_for(main(), 900))))  # seconds that only a hang takes
