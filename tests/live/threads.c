/* SPDX-License-Identifier: LGPL-2.1-or-later
   A process to make a core of: threads that wait in calls of their own, registers and memory with known content.
   usage: threads FILE      FILE has at least three pages */
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#define PAGE 4096
#define THREADS 3

char *shared, *sparse, *file, *clean;
static pthread_barrier_t ready;

/* wait for ever in pause(2), with a value in a register that calls keep and one in a vector register */
__attribute__((noinline)) static long wait_here(uint64_t number)
{
	long result = 34;
	register uint64_t kept asm("r12") = number * 0x0101010101010101;
	asm volatile("movq %1, %%xmm7\n\tsyscall" : "+a"(result) : "r"(kept) : "rcx", "r11", "xmm7", "memory");
	return result + (long)kept;
}

__attribute__((noinline)) static long descend(int depth, uint64_t number)
{
	char local[64];
	snprintf(local, sizeof local, "depth %d of thread %d", depth, (int)number);
	long result = depth ? descend(depth - 1, number) : wait_here(number);
	return result + local[0];
}

static void *run(void *arg)
{
	uint64_t number = (uintptr_t)arg;
	pthread_barrier_wait(&ready);
	return (void *)descend((int)number, number);
}

int main(int argc, char **argv)
{
	int fd = open(argv[argc - 1], O_RDONLY);
	pthread_t threads[THREADS];
	sigset_t blocked;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	shared = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	sparse = mmap(NULL, 256UL << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	file = mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	clean = mmap(NULL, 3 * PAGE, PROT_READ, MAP_PRIVATE, fd, 0);
	if (fd < 0 || shared == MAP_FAILED || sparse == MAP_FAILED || file == MAP_FAILED || clean == MAP_FAILED)
		return 1;
	madvise(sparse, 256UL << 20, MADV_NOHUGEPAGE);
	strcpy(shared + 2 * PAGE, "in shared memory");
	strcpy(sparse + (200UL << 20), "far into the sparse");
	strcpy(file + PAGE, "changed page");

	sigemptyset(&blocked);
	sigaddset(&blocked, SIGUSR1);
	sigprocmask(SIG_BLOCK, &blocked, NULL);
	sigqueue(getpid(), SIGUSR1, (union sigval){ .sival_int = 77 });

	pthread_barrier_init(&ready, NULL, THREADS + 1);
	for (uintptr_t number = 1; number <= THREADS; number++)
		pthread_create(&threads[number - 1], NULL, run, (void *)number);
	pthread_barrier_wait(&ready);
	puts("ready");
	fclose(stdout);
	return (int)descend(5, 9);
}
