/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A process whose struct rseq, rseq(2), is in a file that others may write: `shared` in its working directory. The
 * descriptor of its critical section is there too, and covers all addresses above its own program. Who writes the
 * address of the descriptor to the file sends it to `handler` the next time that it is preempted up there.
 *
 * The handler leaves in the file PROOF, which is whoever's it runs as, the capabilities that it has, capget(2).
 */
#include "victim.h"

#include <linux/capability.h>
#include <sys/mman.h>

#define SIGNATURE 0x53053053
#define AREA 0x10000000ul
#define ABOVE 0x20000000ul
#define BELOW 0x7fffffffe000ul       /* the end of a section is below TASK_SIZE, or it is none */

extern char handler[];
static struct __user_cap_header_struct header __attribute__((used)) = {_LINUX_CAPABILITY_VERSION_3, 0};
static struct __user_cap_data_struct data[2] __attribute__((used));

__asm__(
    ".text\n"
    ".balign 16\n"
    ".long 0x53053053\n"                /* the kernel asks for the signature before what it jumps to */
    "handler:\n"
    "    mov $125, %eax\n"              /* capget */
    "    mov $header, %edi\n"
    "    mov $data, %esi\n"
    "    syscall\n"
    "    mov $2, %eax\n"                /* open, O_WRONLY | O_CREAT */
    "    mov $proof, %edi\n"
    "    mov $0x41, %esi\n"
    "    mov $0600, %edx\n"
    "    syscall\n"
    "    mov %eax, %edi\n"
    "    mov $1, %eax\n"                /* write */
    "    mov $data, %esi\n"
    "    mov $24, %edx\n"
    "    syscall\n"
    "    mov $231, %eax\n"              /* exit_group */
    "    xor %edi, %edi\n"
    "    syscall\n"
    "proof: .asciz \"" PROOF "\"\n");

/* <linux/rseq.h> */
struct area {
    uint32_t cpu_id_start, cpu_id;
    uint64_t rseq_cs;
    uint32_t flags, node_id, mm_cid, pad;
    struct { uint32_t version, flags; uint64_t start_ip, post_commit_offset, abort_ip; } descriptor
        __attribute__((aligned(32)));
};

int main(void)
{
    int fd = MUST(open("shared", O_RDWR | O_CREAT, 0600));
    struct area *area;

    MUST(ftruncate(fd, 4096));
    area = mmap((void *)AREA, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, fd, 0);
    CHECK(area == (void *)AREA, "mmap");
    area->cpu_id = (uint32_t)-1;
    area->descriptor.start_ip = ABOVE;
    area->descriptor.post_commit_offset = BELOW - ABOVE;
    area->descriptor.abort_ip = (uintptr_t)handler;
    MUST(syscall(SYS_rseq, area, sizeof(*area) / 2, 0, SIGNATURE));
    ready();
    wait_for_go();
    return 0;
}
