"""memcached with clients that know what every answer must be. Writes to count how many answers were right, or what was wrong."""

import os
import socket
import subprocess
import sys
import threading
import time

program, folder, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
os.chdir(folder)
server = subprocess.Popen([program, "-u", "nobody", "-t", "4", "-l", "127.0.0.1", "-p", str(port), "-m", "64"])
answers = [0] * 4
wrong = []


def connect():
    for _ in range(500):
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            time.sleep(0.02)
    raise TimeoutError


def client(n):
    with connect() as connection:
        stream = connection.makefile("rwb")

        def ask(words, value=None):
            stream.write(words.encode() + b"\r\n" + (value + b"\r\n" if value is not None else b""))
            stream.flush()
            return stream.readline().rstrip()

        expect(n, ask(f"set counter-{n} 0 0 1", b"0"), b"STORED")
        known = {}
        for turn in range(1 << 40):
            key = turn * 7919 % 1000
            if key in known:
                expect(n, ask(f"get key-{n}-{key}"), f"VALUE key-{n}-{key} 0 {len(known[key])}".encode())
                expect(n, stream.readline().rstrip(), known[key])
                expect(n, stream.readline().rstrip(), b"END")
            known[key] = f"{turn}-".encode() * (turn % 60)
            expect(n, ask(f"set key-{n}-{key} 0 0 {len(known[key])}", known[key]), b"STORED")
            expect(n, ask(f"incr counter-{n} 1"), str(turn + 1).encode())
            answers[n] += 1


def expect(n, answer, expected):
    if answer != expected:
        wrong.append(f"client {n}: {answer} instead of {expected}")
        raise SystemExit


def run(n):
    try:
        client(n)
    except Exception as error:
        wrong.append(f"client {n}: {error!r}")


for n in range(4):
    threading.Thread(target=run, args=(n,), daemon=True).start()
while True:
    with open("count.new", "w") as file:
        file.write(wrong[0] if wrong else str(sum(answers)))
    os.rename("count.new", "count")
    time.sleep(0.02)
