"""A line goes through socat, twice, and to nc; it must come back from the former, and arrive in the latter's file. Writes to
count how many came back, or what was wrong."""

import os
import socket
import subprocess
import sys
import time

folder, port = sys.argv[1], int(sys.argv[2])
os.chdir(folder)
subprocess.Popen(["socat", f"TCP-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr", "EXEC:cat"])
subprocess.Popen(["socat", "UNIX-LISTEN:relay,fork", f"TCP:127.0.0.1:{port}"])
with open("arrived", "w") as file:
    subprocess.Popen(["nc", "-l", "127.0.0.1", str(port + 1)], stdin=subprocess.PIPE, stdout=file)


def patiently(connect):
    for _ in range(500):
        try:
            return connect()
        except (ConnectionRefusedError, FileNotFoundError):
            time.sleep(0.02)
    raise TimeoutError


def unix():
    end = socket.socket(socket.AF_UNIX)
    end.connect("relay")
    return end


patiently(lambda: socket.create_connection(("127.0.0.1", port))).close()
there_and_back = patiently(unix).makefile("rwb")
one_way = patiently(lambda: socket.create_connection(("127.0.0.1", port + 1)))
turn = 0
while True:
    line = f"{turn}\n".encode()
    there_and_back.write(line)
    there_and_back.flush()
    one_way.sendall(line)
    answer = there_and_back.readline()
    turn += 1
    report = str(turn) if answer == line else f"{answer} instead of {line}"
    if turn % 50 == 0:
        lines = open("arrived").read().split("\n")[:-1]
        if lines != [str(n) for n in range(len(lines))] or len(lines) < turn - 50:
            report = f"{len(lines)} lines of {turn} arrived, or in disorder"
    with open("count.new", "w") as file:
        file.write(report)
    os.rename("count.new", "count")
    time.sleep(0.001)
