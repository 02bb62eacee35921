"""A PyTorch training loop on a GPU: train.py FOLDER [STEPS]; what it writes is as of tests/programs/train.py."""
import os
import sys

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
import torch

folder = sys.argv[1]
limit = int(sys.argv[2]) if len(sys.argv) > 2 else None
torch.manual_seed(7)
torch.use_deterministic_algorithms(True)
device = torch.device("cuda")
model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 10)).to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
source = torch.Generator(device=device).manual_seed(11)
losses = []
steps, check = os.path.join(folder, "steps"), os.path.join(folder, "check")
open(steps, "w").close()
while not os.path.exists(check) and len(losses) != limit:
    x = torch.randn(512, 256, device=device, generator=source)
    y = (x[:, :10] * 3).argmax(dim=1)
    loss = torch.nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(repr(loss.item()))
    os.truncate(steps, len(losses))
half = os.path.join(folder, "losses.new")
with open(half, "w") as out:
    out.write("\n".join(losses))
os.rename(half, os.path.join(folder, "losses"))
