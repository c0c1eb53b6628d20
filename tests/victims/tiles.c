/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * AMX: a process that has asked for the permission to use tiles (ARCH_REQ_XCOMP_PERM of arch_prctl(2)), two threads that
 * have data in them, one that never did, and a forked child that has inherited the permission alone. On a machine
 * without AMX there is nothing to check.
 */
#include "victim.h"

#include <cpuid.h>
#include <pthread.h>
#include <sys/wait.h>

/* <asm/prctl.h> */
#define ARCH_GET_XCOMP_PERM 0x1022
#define ARCH_REQ_XCOMP_PERM 0x1023
#define XTILEDATA 18

#define TILES 8
#define ROWS 16
#define ROW 64

struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
typedef unsigned char tile[ROWS * ROW];

static bool has_tiles(void)
{
    unsigned int a, b, c, d;

    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1)
           && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
}

static uint64_t permissions(void)
{
    uint64_t found = 0;

    MUST(syscall(SYS_arch_prctl, ARCH_GET_XCOMP_PERM, &found));
    return found;
}

static void configure(void)
{
    struct tile_config config = {.palette = 1};

    for (int i = 0; i < TILES; i++) {
        config.row_bytes[i] = ROW;
        config.rows[i] = ROWS;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

#define LOAD(n) case n: __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #n : : "r"(from), "r"(stride) : "memory"); break
#define STORE(n) case n: __asm__ volatile("tilestored %%tmm" #n ", (%0,%1,1)" : : "r"(to), "r"(stride) : "memory"); break

static void load(int number, const void *from)
{
    long stride = ROW;

    switch (number) {
    LOAD(0); LOAD(1); LOAD(2); LOAD(3); LOAD(4); LOAD(5); LOAD(6); LOAD(7);
    }
}

static void store(int number, void *to)
{
    long stride = ROW;

    switch (number) {
    STORE(0); STORE(1); STORE(2); STORE(3); STORE(4); STORE(5); STORE(6); STORE(7);
    }
}

static void fill_tiles(uint64_t seed)
{
    tile data;

    configure();
    for (int i = 0; i < TILES; i++) {
        fill(data, sizeof data, seed + (uint64_t)i);
        load(i, data);
    }
}

static void check_tiles(uint64_t seed)
{
    tile data;

    for (int i = 0; i < TILES; i++) {
        memset(data, 0, sizeof data);
        store(i, data);
        check_filled(data, sizeof data, seed + (uint64_t)i, "tile");
    }
}

static pthread_barrier_t prepared, checked;

static void *with_tiles(void *unused)
{
    fill_tiles(100);
    pthread_barrier_wait(&prepared);
    pthread_barrier_wait(&checked);
    check_tiles(100);
    return unused;
}

static void *without_tiles(void *unused)
{
    pthread_barrier_wait(&prepared);
    pthread_barrier_wait(&checked);
    fill_tiles(200);        /* it may, afterwards as before */
    check_tiles(200);
    return unused;
}

int main(void)
{
    pthread_t threads[2];
    uint64_t before;
    int go[2], status;
    pid_t child;

    if (!has_tiles()) {
        ready();
        wait_for_go();
        return 0;
    }
    before = permissions();
    CHECK(before >> XTILEDATA & 1, "permissions %#lx", before);
    MUST(pipe(go));
    child = MUST(fork());
    if (child == 0) {
        char byte;

        not_the_one_to_report();
        CHECK(read(go[0], &byte, 1) == 1, "the word to go");
        CHECK(permissions() == before, "permissions of the child %#lx", permissions());
        fill_tiles(300);
        check_tiles(300);
        _exit(0);
    }
    pthread_barrier_init(&prepared, NULL, 3);
    pthread_barrier_init(&checked, NULL, 3);
    CHECK(pthread_create(&threads[0], NULL, with_tiles, NULL) == 0, "pthread_create");
    CHECK(pthread_create(&threads[1], NULL, without_tiles, NULL) == 0, "pthread_create");
    pthread_barrier_wait(&prepared);
    fill_tiles(1);
    ready();
    wait_for_go();
    check_tiles(1);
    CHECK(permissions() == before, "permissions %#lx", permissions());
    pthread_barrier_wait(&checked);
    for (int i = 0; i < 2; i++)
        CHECK(pthread_join(threads[i], NULL) == 0, "pthread_join");
    CHECK(write(go[1], "", 1) == 1, "write");
    CHECK(waitpid(child, &status, 0) == child && status == 0, "the child ended with %#x", (unsigned int)status);
    return 0;
}
