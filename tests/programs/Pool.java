import java.nio.file.*;
import java.util.*;
import java.util.concurrent.*;
import java.util.concurrent.atomic.*;

/** A pool of threads that fill and replace arrays. Writes to count how many were right, or what was wrong. */
public class Pool {
    public static void main(String[] args) throws Exception {
        Path folder = Path.of(args[0]);
        ExecutorService pool = Executors.newFixedThreadPool(6);
        ConcurrentHashMap<Integer, byte[]> table = new ConcurrentHashMap<>();
        AtomicLong right = new AtomicLong();
        AtomicReference<String> wrong = new AtomicReference<>();
        ScheduledExecutorService clock = Executors.newScheduledThreadPool(1);
        AtomicLong ticks = new AtomicLong();
        clock.scheduleAtFixedRate(ticks::incrementAndGet, 5, 5, TimeUnit.MILLISECONDS);
        for (int n = 0; n < 6; n++) {
            Random random = new Random(n);
            pool.submit(() -> {
                while (wrong.get() == null) {
                    int key = random.nextInt(5000);
                    byte[] fresh = new byte[200 + key % 700];
                    Arrays.fill(fresh, (byte) key);
                    byte[] old = table.put(key, fresh);
                    if (old != null && !Arrays.equals(old, fresh)) {
                        wrong.set("array " + key);
                    }
                    if (right.incrementAndGet() % 1000 == 0) {
                        synchronized (table) {
                            table.wait(1);
                        }
                    }
                }
                return null;
            });
        }
        for (long before = -1, still = 0;;) {
            Thread.sleep(50);
            // while nobody runs, nothing ticks, and who wakes first afterwards is anybody's guess
            long now = ticks.get();
            still = before == now ? still + 1 : 0;
            before = now;
            String report = wrong.get() != null ? wrong.get() : still > 40 ? "no tick" : right.toString();
            Files.writeString(folder.resolve("count.new"), report);
            Files.move(folder.resolve("count.new"), folder.resolve("count"), StandardCopyOption.ATOMIC_MOVE);
        }
    }
}
