"""A program with threads, a database, and a child on pipes. On SIGTERM it checks all of them, and writes what it found to
result: ok, or what was wrong."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time

folder = sys.argv[1]
os.chdir(folder)
asked = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: asked.set())

child = subprocess.Popen(
    [sys.executable, "-u", "-c", "import sys\nfor line in sys.stdin: print(line.strip()[::-1])"],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)


def ask(word):
    child.stdin.write(word + "\n")
    child.stdin.flush()
    return child.stdout.readline().strip()


base = sqlite3.connect("base.sqlite", isolation_level=None)
base.execute("pragma journal_mode=wal")
base.execute("create table numbers (n integer primary key, square integer)")
base.execute("begin")
base.executemany("insert into numbers values (?, ?)", ((n, n * n) for n in range(1000)))
# the transaction stays open across the checkpoint

counts = [0] * 8
lock = threading.Lock()
total = 0
stop = False


def work(n):
    global total
    while not stop:
        with lock:
            total += 1
            counts[n] += 1
        if n % 2:
            time.sleep(0.001)
        else:
            sum(range(2000))


threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
for thread in threads:
    thread.start()
assert ask("ready") == "ydaer"
generator = (n * n for n in range(10))
next(generator)
with open("ready", "w") as file:
    file.write(str(os.getpid()))

while not asked.wait(0.05):
    pass

wrong = []


def check(holds, what):
    if not holds:
        wrong.append(what)


seen = list(counts)
deadline = time.monotonic() + 10
while time.monotonic() < deadline and any(now == then for now, then in zip(counts, seen)):
    time.sleep(0.01)
check(all(now > then for now, then in zip(counts, seen)), f"threads do not go on: {seen} {counts}")
stop = True
for thread in threads:
    thread.join()
check(total == sum(counts), f"{total} is not the sum of {counts}")
check(ask("restored") == "derotser", "the child answers")
check(list(generator) == [n * n for n in range(1, 10)], "a generator goes on")
base.execute("insert into numbers values (1000, 1000000)")
base.execute("commit")
other = sqlite3.connect("base.sqlite")
check(other.execute("select count(*), sum(square) from numbers").fetchone()
      == (1001, sum(n * n for n in range(1001))), "the transaction was kept")
check(other.execute("pragma integrity_check").fetchone() == ("ok",), "the database is whole")
child.stdin.close()
check(child.wait(10) == 0, "the child ends well")
with open("result.new", "w") as file:
    file.write("; ".join(wrong) or "ok")
os.rename("result.new", "result")
