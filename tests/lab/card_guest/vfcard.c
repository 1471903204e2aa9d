/* Drives a slice's function through vfio, as docs/card-protocol.md says, and tells what it saw.
 *
 *     vfcard GROUP ADDRESS FOREIGN-KEY FOREIGN-ADDRESS
 *     vfcard mailbox SYSFS-DIRECTORY
 *
 *     vfcard shared SYSFS-DIRECTORY
 *     vfcard shared-vfio GROUP ADDRESS
 *
 * The second looks at a management function through sysfs: it says something that is no TLS. The third does the same
 * with an ivshmem device, then writes and rings until there is none. The fourth rings it and waits for its interrupts.
 *
 * It judges nothing: each line of its output is "VFCARD name=value", for whoever runs the guest.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/vfio.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { IOVA = 0x100000, SIZE = 2 << 20, RING = 0, DONE = 0x1000, IN = 0x100000, OUT = 0x140000, PARAM = 0x180000 };
enum { STORE = 1, LOAD = 2, SEAL = 0x10, OPEN = 0x11 };

struct descriptor {
    uint16_t operation, flags;
    uint32_t key;
    uint64_t source, target, parameter, card;
    uint32_t source_length, target_length, parameter_length, card_length, cookie, reserved;
};
struct completion { uint32_t status, written, cookie, number; };

static volatile uint32_t *bar;
static uint8_t *ram;
static uint32_t sent;
static int device, event;
static uint64_t config;

static void die(const char *what) {
    printf("VFCARD failed=%s: %s\n", what, strerror(errno));
    exit(1);
}
static uint32_t get(unsigned at) { return bar[at / 4]; }
static void put(unsigned at, uint32_t value) { bar[at / 4] = value; }
static uint64_t get64(unsigned at) { return get(at) | (uint64_t)get(at + 4) << 32; }
static void tell(const char *name, uint64_t value) { printf("VFCARD %s=%llu\n", name, (unsigned long long)value); }

static void tell_bytes(const char *name, const uint8_t *data, unsigned size) {
    printf("VFCARD %s=", name);
    while (size--) printf("%02x", *data++);
    printf("\n");
}
static unsigned bytes_of(const char *hex, uint8_t *into) {
    unsigned size = strlen(hex) / 2;
    for (unsigned i = 0; i < size; i++) { unsigned v; sscanf(hex + 2 * i, "%2x", &v); into[i] = v; }
    return size;
}
static void enable(void) {
    uint16_t command;
    if (pread(device, &command, 2, config + 4) != 2) die("config");
    command |= 6;
    if (pwrite(device, &command, 2, config + 4) != 2) die("config");
    struct { struct vfio_irq_set set; int fd; } irq = {
        { sizeof irq, VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_PCI_MSI_IRQ_INDEX, 0, 1 }, event };
    if (ioctl(device, VFIO_DEVICE_SET_IRQS, &irq)) die("MSI");
    put(0x200, IOVA + RING); put(0x204, 0);
    put(0x208, IOVA + DONE); put(0x20c, 0);
    put(0x210, 8);
    memset(ram + DONE, 0, 8 * 16);
    put(0x214, 1);
    put(0x14, 1);
    sent = 0;
}
/* One operation; waits for the interrupt, not for memory. */
static struct completion run(struct descriptor d, int quiet) {
    d.flags = !quiet;
    d.cookie = 0xc0ffee;
    memcpy(ram + RING + 64 * (sent % 8), &d, sizeof d);
    volatile struct completion *done = (void *)(ram + DONE + 16 * (sent % 8));
    put(0x21c, ++sent);
    struct pollfd wait = { event, POLLIN, 0 };
    if (!quiet) {
        uint64_t count = 0;
        if (poll(&wait, 1, 10000) != 1 || read(event, &count, 8) != 8) die("no interrupt");
        put(0x10, 1);
    }
    time_t end = time(0) + 10;
    while (done->number != sent) if (time(0) > end) die("no completion");
    return *(struct completion *)done;
}
static void aes(const char *name, uint32_t key, uint64_t card, const char *secret, const char *nonce_and_more, const char *plain) {
    char label[64];
    unsigned secret_size = bytes_of(secret, ram + IN);
    struct completion c = run((struct descriptor){ STORE, 0, key, IOVA + IN, 0, 0, card, secret_size }, 0);
    if (c.status) { snprintf(label, 64, "%s-store", name); tell(label, c.status); return; }
    unsigned size = bytes_of(plain, ram + IN), more = bytes_of(nonce_and_more, ram + PARAM);
    memset(ram + OUT, 0xee, 256);
    c = run((struct descriptor){ SEAL, 0, key, IOVA + IN, IOVA + OUT, IOVA + PARAM, card, size, 4096, more, secret_size }, 0);
    snprintf(label, 64, "%s-status", name); tell(label, c.status);
    snprintf(label, 64, "%s-sealed", name); tell_bytes(label, ram + OUT, c.written);
    memcpy(ram + IN, ram + OUT, c.written);
    c = run((struct descriptor){ OPEN, 0, key, IOVA + IN, IOVA + OUT, IOVA + PARAM, card, c.written, 4096, more, secret_size }, 0);
    snprintf(label, 64, "%s-opened", name); tell_bytes(label, ram + OUT, c.written);
    ram[IN] ^= 1;
    c = run((struct descriptor){ OPEN, 0, key, IOVA + IN, IOVA + OUT, IOVA + PARAM, card, size + 16, 4096, more, secret_size }, 0);
    snprintf(label, 64, "%s-forged", name); tell(label, c.status);
}
static volatile uint8_t *resource(const char *directory, int number, unsigned size) {
    char path[256];
    snprintf(path, sizeof path, "%s/resource%d", directory, number);
    int fd = open(path, O_RDWR | O_SYNC);
    if (fd < 0) die(path);
    void *at = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) die(path);
    return at;
}
static void measure_reads(const char *name, volatile uint8_t *memory, int size) {
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    for (int i = 0; i < size; i += 4) (void)*(volatile uint32_t *)(memory + i);
    clock_gettime(CLOCK_MONOTONIC, &b);
    tell(name, size / 4 * 1e9 / ((b.tv_sec - a.tv_sec) * 1e9 + (b.tv_nsec - a.tv_nsec)));
}
static void wait_for(unsigned at, uint32_t value) {
    time_t end = time(0) + 10;
    while (get(at) != value) if (time(0) > end) { tell("mailbox-register", get(at)); die("no change"); }
}
static int mailbox(const char *directory) {
    static const uint8_t junk[] = "\x16\x03\x01\x00\x05hello";
    bar = (void *)resource(directory, 0, 4096);
    volatile uint8_t *window = resource(directory, 2, 0x20000);
    tell_bytes("mailbox-magic", (uint8_t[]){ get(0), get(0) >> 8, get(0) >> 16, get(0) >> 24 }, 4);
    put(0x10, 1);
    wait_for(0xc, 3);
    for (unsigned i = 0; i < sizeof junk - 1; i++) window[get(0x20) + i] = junk[i];
    put(0x28, sizeof junk - 1);
    wait_for(0xc, 5);
    uint8_t answer[2] = { window[get(0x30)], window[get(0x30) + 1] };
    tell_bytes("mailbox-answer", answer, 2);
    tell("mailbox-answer-length", get(0x38));
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    for (int i = 0; i < 2000; i++) (void)get(0);
    clock_gettime(CLOCK_MONOTONIC, &b);
    tell("register-reads-per-second", 2000e9 / ((b.tv_sec - a.tv_sec) * 1e9 + (b.tv_nsec - a.tv_nsec)));
    measure_reads("window-reads-per-second", window, 0x20000);
    return 0;
}
/* The registers are in the memory; a change of WANTED is a new session, the bell is for peer 0, vector 0. */
static void shared(const char *directory) {
    static const uint8_t junk[] = "\x16\x03\x01\x00\x05hello";
    char path[256];
    unsigned long long start = 0;
    snprintf(path, sizeof path, "%s/resource", directory);
    FILE *list = fopen(path, "r");
    if (!list || fscanf(list, "%llx", &start) != 1) die(path);
    volatile uint32_t *doorbell = (void *)(resource(directory, 0, 4096) + (start & 4095) + 12);
    volatile uint8_t *memory = resource(directory, 2, 0x40000);
    bar = (void *)(memory + 0x20000);
    tell_bytes("shared-magic", (uint8_t[]){ get(0), get(0) >> 8, get(0) >> 16, get(0) >> 24 }, 4);
    tell("shared-id", doorbell[-1]);
    put(0x28, 0); put(0x3c, 0);
    uint32_t session = get(0x10) + 1;
    put(0x10, session);
    *doorbell = 0;
    wait_for(0x14, session);
    tell("shared-status", get(0xc));
    for (unsigned i = 0; i < sizeof junk - 1; i++) memory[get(0x20) + i] = junk[i];
    put(0x28, sizeof junk - 1);
    *doorbell = 0;
    wait_for(0xc, 5);
    uint8_t answer[2] = { memory[get(0x30)], memory[get(0x30) + 1] };
    tell_bytes("shared-answer", answer, 2);
    tell("shared-answer-length", get(0x38));
    measure_reads("shared-reads-per-second", memory, 0x20000);
    for (unsigned beat = 1;; beat++) {
        put(0x28, beat);
        *doorbell = 0;
        if (get(0) != 0x4d434656) exit(0); /* unplugged */
        if (get(0x28) != beat) die("the memory changed");
        tell("shared-beat", beat);
        usleep(200000);
    }
}
static void open_device(const char *number, const char *address, int *container) {
    char path[64];
    snprintf(path, sizeof path, "/dev/vfio/%s", number);
    int group = open(path, O_RDWR);
    *container = open("/dev/vfio/vfio", O_RDWR);
    if (*container < 0 || group < 0) die("open");
    struct vfio_group_status status = { sizeof status };
    if (ioctl(group, VFIO_GROUP_GET_STATUS, &status) || !(status.flags & VFIO_GROUP_FLAGS_VIABLE)) die("viable");
    if (ioctl(group, VFIO_GROUP_SET_CONTAINER, container)) die("container");
    if (ioctl(*container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU)) die("iommu");
    if ((device = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, address)) < 0) die("device");
}
static uint64_t offset_of(unsigned index) {
    struct vfio_region_info region = { sizeof region, 0, index };
    if (ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &region)) die("region");
    return region.offset;
}
static int shared_vfio(const char *group, const char *address) {
    int container;
    open_device(group, address, &container);
    config = offset_of(VFIO_PCI_CONFIG_REGION_INDEX);
    uint8_t *memory = mmap(0, 0x40000, PROT_READ | PROT_WRITE, MAP_SHARED, device, offset_of(2));
    if (memory == MAP_FAILED) die("mmap");
    bar = (void *)(memory + 0x20000);
    event = eventfd(0, 0);
    uint16_t command = 6;
    pwrite(device, &command, 2, config + 4);
    struct { struct vfio_irq_set set; int fd; } irq = {
        { sizeof irq, VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_PCI_MSIX_IRQ_INDEX, 0, 1 }, event };
    if (ioctl(device, VFIO_DEVICE_SET_IRQS, &irq)) die("MSI-X");
    uint32_t bell = 0, session = get(0x10), rounds = 50;
    uint64_t interrupts = 0;
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    for (unsigned i = 0; i < rounds; i++) {
        put(0x10, ++session);
        pwrite(device, &bell, 4, offset_of(0) + 12);
        do {
            uint64_t count;
            struct pollfd wait = { event, POLLIN, 0 };
            if (poll(&wait, 1, 10000) != 1 || read(event, &count, 8) != 8) die("no interrupt");
            interrupts += count;
        } while (get(0x14) != session);
    }
    clock_gettime(CLOCK_MONOTONIC, &b);
    tell("shared-doorbell-round-us", ((b.tv_sec - a.tv_sec) * 1000000 + (b.tv_nsec - a.tv_nsec) / 1000) / rounds);
    tell("shared-interrupts", interrupts);
    return 0;
}
int main(int argc, char **argv) {
    setvbuf(stdout, 0, _IOLBF, 4096); /* a line at once: two of us may talk */
    if (argc == 3 && !strcmp(argv[1], "mailbox")) return mailbox(argv[2]);
    if (argc == 3 && !strcmp(argv[1], "shared")) shared(argv[2]);
    if (argc == 4 && !strcmp(argv[1], "shared-vfio")) return shared_vfio(argv[2], argv[3]);
    if (argc != 5) return 2;
    int container;
    open_device(argv[1], argv[2], &container);
    struct vfio_device_info info = { sizeof info };
    ioctl(device, VFIO_DEVICE_GET_INFO, &info);
    tell("can-reset", !!(info.flags & VFIO_DEVICE_FLAGS_RESET));
    struct vfio_irq_info irq = { sizeof irq, 0, VFIO_PCI_MSI_IRQ_INDEX };
    ioctl(device, VFIO_DEVICE_GET_IRQ_INFO, &irq);
    tell("msi-vectors", irq.count);
    irq.index = VFIO_PCI_MSIX_IRQ_INDEX;
    ioctl(device, VFIO_DEVICE_GET_IRQ_INFO, &irq);
    tell("msix-vectors", irq.count);
    config = offset_of(VFIO_PCI_CONFIG_REGION_INDEX);
    bar = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, device, offset_of(0));
    ram = mmap(0, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (bar == MAP_FAILED || ram == MAP_FAILED) die("mmap");
    struct vfio_iommu_type1_dma_map map = { sizeof map, 3, (uint64_t)(uintptr_t)ram, IOVA, SIZE };
    if (ioctl(container, VFIO_IOMMU_MAP_DMA, &map)) die("map");
    event = eventfd(0, 0);
    uint16_t command = 6;
    pwrite(device, &command, 2, config + 4);
    tell_bytes("magic", (uint8_t[]){ get(0), get(0) >> 8, get(0) >> 16, get(0) >> 24 }, 4);
    tell("state", get(0xc));
    put(0x38, 0); put(0x104, 0);
    uint32_t key = get(0x3c);
    uint64_t card = get64(0x108);
    enable();
    tell("dma-read-before", get64(0x128));
    const char *iv = "cafebabefacedbaddecaf888feedfacedeadbeeffeedfacedeadbeefabaddad2";
    const char *plain = "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39";
    aes("case4", key, card, "feffe9928665731c6d6a8f9467308308", iv, plain);
    aes("case16", key, card, "feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308", iv, plain);
    tell("dma-read-after", get64(0x128));
    tell("dma-written-after", get64(0x130));

    uint32_t foreign = strtoul(argv[3], 0, 0);
    uint64_t theirs = strtoull(argv[4], 0, 0);
    tell("foreign-status", run((struct descriptor){ LOAD, 0, foreign, 0, IOVA + OUT, 0, theirs, 0, 64, 0, 16 }, 0).status);
    tell("foreign-fault", get(0x20));
    tell("foreign-fault-key", get(0x24));
    put(0x20, ~0u);
    tell("outside-status", run((struct descriptor){ STORE, 0, key, 0x40000000, 0, 0, card, 16 }, 0).status);
    tell("outside-fault", get(0x20));
    tell("outside-fault-address", get64(0x28));
    tell("outside-refused", get(0x138));

    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    for (int i = 0; i < 200; i++) run((struct descriptor){ 0 }, 1);
    clock_gettime(CLOCK_MONOTONIC, &b);
    tell("operation-us", ((b.tv_sec - a.tv_sec) * 1000000 + (b.tv_nsec - a.tv_nsec) / 1000) / 200);
    clock_gettime(CLOCK_MONOTONIC, &a);
    for (int i = 0; i < 50; i++) run((struct descriptor){ 0 }, 0);
    clock_gettime(CLOCK_MONOTONIC, &b);
    tell("operation-with-interrupt-us", ((b.tv_sec - a.tv_sec) * 1000000 + (b.tv_nsec - a.tv_nsec) / 1000) / 50);

    if (ioctl(device, VFIO_DEVICE_RESET)) die("reset");
    command = 6;
    pwrite(device, &command, 2, config + 4);
    tell("after-reset-fault", get(0x20));
    tell("after-reset-queue", get(0x218));
    enable();
    tell("after-reset-status", run((struct descriptor){ 0 }, 0).status);
    printf("VFCARD end=0\n");
    return 0;
}
