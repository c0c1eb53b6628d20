// SPDX-License-Identifier: LGPL-2.1-or-later
// Threads that compute, meet under a lock and leave garbage behind, until there is a file `enough`; says of each how
// many rounds it made, and what came of them.
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;

public class Compute {
    static final int BATCH = 10_000;
    static final Object LOCK = new Object();
    static volatile boolean enough;
    static long total;

    static class Worker extends Thread {
        long rounds;
        long value = 1;

        @Override
        public void run() {
            List<long[]> kept = new ArrayList<>();
            while (!enough) {
                for (int i = 0; i < BATCH; i++)
                    value = value * 6364136223846793005L + 1442695040888963407L;
                rounds += BATCH;
                kept.add(new long[] {value, rounds});
                if (kept.size() > 1000)
                    kept = new ArrayList<>(kept.subList(900, kept.size()));
                long[] last = kept.get(kept.size() - 1);
                if (last[0] != value || last[1] != rounds)
                    throw new IllegalStateException("what was kept has changed");
                synchronized (LOCK) {
                    total += BATCH;
                }
            }
        }
    }

    public static void main(String[] arguments) throws Exception {
        Worker[] workers = {new Worker(), new Worker(), new Worker()};
        for (Worker worker : workers)
            worker.start();
        Files.createFile(Path.of("working"));
        while (!Files.exists(Path.of("enough")))
            Thread.sleep(10);
        enough = true;
        long rounds = 0;
        for (Worker worker : workers) {
            worker.join();
            rounds += worker.rounds;
        }
        if (rounds != total)
            throw new IllegalStateException(rounds + " rounds were made and " + total + " counted");
        for (Worker worker : workers)
            System.out.println(worker.rounds + " " + Long.toUnsignedString(worker.value));
    }
}
