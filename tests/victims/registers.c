/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A thread spins with a pattern in every register that a program has: general, x87, and the widest vectors of the
 * machine. Whatever stops it in the loop must give all of them back.
 */
#include "victim.h"

#include <cpuid.h>
#include <pthread.h>

#define GPRS 15         /* all but rsp */

enum width { XMM = 16, YMM = 32, ZMM = 64 };

/* read and written by the loop below, %rip-relative, so that no register is needed to find them */
__attribute__((used)) static uint64_t gpr_in[GPRS], gpr_out[GPRS];
__attribute__((used, aligned(64))) static unsigned char vector_in[32 * 64], vector_out[32 * 64];
__attribute__((used)) static uint64_t mask_in[8], mask_out[8];
__attribute__((used)) static double x87_in[8], x87_out[8];
__attribute__((used)) static uint16_t x87_control = 0x0c7f;     /* round to zero: not the default 0x037f */
__attribute__((used)) static uint32_t mxcsr = 0x7f80, mxcsr_out;        /* round to zero: not the default 0x1f80 */
__attribute__((used)) static uint16_t x87_control_out;
__attribute__((used)) static volatile uint64_t loops;
__attribute__((used)) static volatile uint32_t stop;

/* One function per vector width. %1 is the instruction that loads and stores, %2 the register's letter, %3 its size,
 * %4 how many there are. The GPRs are last in and first out; the loop itself changes memory and flags only. */
#define SPIN(name, move, letter, size, count, masks_in, masks_out) __asm__( \
    ".text\n.type " #name ", @function\n" #name ":\n" \
    "push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n" \
    "fninit; fldcw x87_control(%rip); ldmxcsr mxcsr(%rip)\n" \
    ".irp n, 0,1,2,3,4,5,6,7\n fldl x87_in+8*\\n(%rip)\n.endr\n" \
    ".altmacro\n" \
    ".macro load_" #name " n\n " move " vector_in+" size "*\\n(%rip), %" letter "\\n\n.endm\n" \
    ".macro save_" #name " n\n " move " %" letter "\\n, vector_out+" size "*\\n(%rip)\n.endm\n" \
    ".set i, 0\n.rept " count "\n load_" #name " %i\n .set i, i+1\n.endr\n" \
    masks_in \
    ".set i, 0\n.irp r, rax,rbx,rcx,rdx,rsi,rdi,rbp,r8,r9,r10,r11,r12,r13,r14,r15\n" \
    " movq gpr_in+8*i(%rip), %\\r\n .set i, i+1\n.endr\n" \
    "1: incq loops(%rip); cmpl $0, stop(%rip); je 1b\n" \
    ".set i, 0\n.irp r, rax,rbx,rcx,rdx,rsi,rdi,rbp,r8,r9,r10,r11,r12,r13,r14,r15\n" \
    " movq %\\r, gpr_out+8*i(%rip)\n .set i, i+1\n.endr\n" \
    masks_out \
    ".set i, 0\n.rept " count "\n save_" #name " %i\n .set i, i+1\n.endr\n" \
    ".noaltmacro\n" \
    "stmxcsr mxcsr_out(%rip); fnstcw x87_control_out(%rip)\n" \
    ".irp n, 7,6,5,4,3,2,1,0\n fstpl x87_out+8*\\n(%rip)\n.endr\n" \
    "fninit\n pushq $0x1f80; ldmxcsr (%rsp); pop %rax\n" \
    "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx; ret\n.size " #name ", .-" #name "\n"); \
    void name(void)

#define MASKS_IN ".irp n, 0,1,2,3,4,5,6,7\n kmovw mask_in+8*\\n(%rip), %k\\n\n.endr\n"
#define MASKS_OUT ".irp n, 0,1,2,3,4,5,6,7\n kmovw %k\\n, mask_out+8*\\n(%rip)\n.endr\n"

SPIN(spin_xmm, "movdqa", "xmm", "16", "16", "", "");
SPIN(spin_ymm, "vmovdqa", "ymm", "32", "16", "", "");
SPIN(spin_zmm, "vmovdqa64", "zmm", "64", "32", MASKS_IN, MASKS_OUT);

static enum width width(void)
{
    return __builtin_cpu_supports("avx512f") ? ZMM : __builtin_cpu_supports("avx") ? YMM : XMM;
}

static void *spin(void *unused)
{
    switch (width()) {
    case XMM: spin_xmm(); break;
    case YMM: spin_ymm(); break;
    case ZMM: spin_zmm(); break;
    }
    return unused;
}

int main(void)
{
    size_t vectors = width() * (width() == ZMM ? 32 : 16);
    uint64_t before;
    pthread_t thread;

    fill(gpr_in, sizeof gpr_in, 1);
    fill(vector_in, sizeof vector_in, 2);
    for (int i = 0; i < 8; i++) {
        mask_in[i] = pattern(3, (uint64_t)i) & 0xffff;
        x87_in[i] = 1.0 / (i + 3);
    }
    CHECK(pthread_create(&thread, NULL, spin, NULL) == 0, "pthread_create");
    while (loops == 0)
        sched_yield();
    ready();
    wait_for_go();
    for (before = loops; loops == before;)      /* it still runs */
        sched_yield();
    stop = 1;
    CHECK(pthread_join(thread, NULL) == 0, "pthread_join");

    for (int i = 0; i < GPRS; i++)
        CHECK(gpr_out[i] == gpr_in[i], "general register %d is %#lx, not %#lx", i, gpr_out[i], gpr_in[i]);
    for (size_t i = 0; i < vectors; i++)
        CHECK(vector_out[i] == vector_in[i], "vector register %zu of %d bytes", i / width(), width());
    for (int i = 0; i < 8; i++) {
        CHECK(width() != ZMM || mask_out[i] == mask_in[i], "k%d is %#lx", i, mask_out[i]);
        CHECK(x87_out[i] == x87_in[i], "st%d is %g, not %g", i, x87_out[i], x87_in[i]);
    }
    CHECK(mxcsr_out == mxcsr, "mxcsr is %#x", mxcsr_out);
    CHECK(x87_control_out == x87_control, "x87 control word is %#x", x87_control_out);
    return 0;
}
