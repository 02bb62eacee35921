"""Processes of a pool, queues, a manager, shared memory, asyncio with a child on pipes, and a compiler that make starts by
vfork. Writes to count how many rounds were right, or what was wrong."""

import asyncio
import multiprocessing
import os
import sys
import time
from multiprocessing import shared_memory

folder = sys.argv[1]
os.chdir(folder)
for n in range(6):
    with open(f"f{n}.c", "w") as file:
        file.write(f"int f{n}(int x) {{ return x * {n}; }}\n")
with open("Makefile", "w") as file:
    objects = " ".join(f"f{n}.o" for n in range(6))
    file.write(f"all: {objects}\n%.o: %.c\n\tcc -O2 -c -o $@ $<\n")


def square(x):
    return x * x


def produce(queue):
    n = 0
    while True:
        queue.put(n)
        n += 1
        time.sleep(0.002)


async def compile_all():
    for n in range(6):
        if os.path.exists(f"f{n}.o"):
            os.remove(f"f{n}.o")
    make = await asyncio.create_subprocess_exec("make", "-s", "-j2")
    code = await make.wait()
    return code == 0 and all(os.path.getsize(f"f{n}.o") for n in range(6))


async def main():
    context = multiprocessing.get_context("fork")
    pool, queue, manager = context.Pool(2), context.Queue(), context.Manager()
    shared = shared_memory.SharedMemory(create=True, size=1 << 20)
    table = manager.dict()
    context.Process(target=produce, args=(queue,), daemon=True).start()
    echo = await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    turn, wrong, building = 0, None, None
    while True:
        if pool.map(square, range(20)) != [x * x for x in range(20)]:
            wrong = "the pool"
        if queue.get() != turn:
            wrong = "the queue"
        turn += 1
        echo.stdin.write(b"%d\n" % turn)
        await echo.stdin.drain()
        if int(await echo.stdout.readline()) != turn:
            wrong = "the pipes"
        table["turn"] = turn
        if table["turn"] != turn:
            wrong = "the manager"
        if turn > 256 and shared.buf[(turn - 256) % 4096] != turn % 256:
            wrong = "shared memory"
        shared.buf[turn % 4096] = turn % 256
        if building is not None and building.done() and not building.result():
            wrong = "the compiler"
        if building is None or building.done():
            building = asyncio.create_task(compile_all())
        await asyncio.sleep(0.001)
        with open("count.new", "w") as file:
            file.write(wrong or str(turn))
        os.rename("count.new", "count")


asyncio.run(main())
