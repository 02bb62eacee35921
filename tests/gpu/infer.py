"""An inference server on a GPU that asks itself, over a TCP connection: infer.py FOLDER [ANSWERS]; writes as train.py does."""
import os
import socket
import struct
import sys
import threading

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
import torch

folder = sys.argv[1]
limit = int(sys.argv[2]) if len(sys.argv) > 2 else None
torch.manual_seed(3)
torch.use_deterministic_algorithms(True)
device = torch.device("cuda")
layer = torch.nn.TransformerEncoderLayer(d_model=128, nhead=8, batch_first=True, dropout=0.0)
model = torch.nn.TransformerEncoder(layer, 4).eval().to(device)
listener = socket.create_server(("127.0.0.1", 0))


def serve():
    peer, _ = listener.accept()
    while True:
        question = peer.recv(4, socket.MSG_WAITALL)
        if len(question) < 4:
            return
        source = torch.Generator(device=device).manual_seed(struct.unpack("<i", question)[0])
        with torch.no_grad():
            answer = model(torch.randn(4, 32, 128, device=device, generator=source)).double().sum()
        peer.sendall(struct.pack("<d", answer.item()))


threading.Thread(target=serve, daemon=True).start()
client = socket.create_connection(listener.getsockname())
answers = []
steps, check = os.path.join(folder, "steps"), os.path.join(folder, "check")
open(steps, "w").close()
while not os.path.exists(check) and len(answers) != limit:
    client.sendall(struct.pack("<i", len(answers)))
    answers.append(repr(struct.unpack("<d", client.recv(8, socket.MSG_WAITALL))[0]))
    os.truncate(steps, len(answers))
half = os.path.join(folder, "losses.new")
with open(half, "w") as out:
    out.write("\n".join(answers))
os.rename(half, os.path.join(folder, "losses"))
