/* Encrypts through a card's slice for as long as its function is there, and tells what came of it.
 *
 *     vfaes ADDRESS [attack]
 *
 * A driver in user space, written from docs/card-protocol.md: sysfs for the registers, one locked page for everything
 * that the card's DMA touches (a guest without an IOMMU: its physical address is the device's). The vectors are those
 * that were submitted to NIST (McGrew and Viega, "The Galois/Counter Mode of Operation", test cases 4 and 16), so that
 * the expected bytes owe nothing to the card.
 *
 * Each line begins with "VFAES ADDRESS" and ends with a judgement that is of this program alone:
 *     state=N              blank, loading, programming, ready as the register says
 *     round=N good         sealed as published, opened again, and what was changed refused
 *     round=N bad WHAT     anything else
 *     attack NAME=N ...    operations that were refused, and those that were not
 */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { RING = 0, DONE = 0x200, IN = 0x400, OUT = 0x800, PARAM = 0xc00, ENTRIES = 8 };
enum { STORE = 1, LOAD = 2, SEAL = 0x10, OPEN = 0x11 };
enum { DMA_REFUSED = 4, ACCESS_FAULT = 5, NOT_AUTHENTIC = 8 };
enum { READY = 3, GONE = 4 };

struct descriptor {
    uint16_t operation, flags;
    uint32_t key;
    uint64_t source, target, parameter, card;
    uint32_t source_length, target_length, parameter_length, card_length, cookie, reserved;
};
struct completion { uint32_t status, written, cookie, number; };

static const char *address;
static volatile uint32_t *bar;
static uint8_t *page;
static uint64_t bus;
static uint32_t sent;

static uint32_t get(unsigned at) { return bar[at / 4]; }
static void put(unsigned at, uint32_t value) { bar[at / 4] = value; }

static void die(const char *what) {
    printf("VFAES %s failed %s: %s\n", address, what, strerror(errno));
    exit(1);
}
static unsigned bytes_of(const char *hex, uint8_t *into) {
    unsigned size = strlen(hex) / 2;
    for (unsigned i = 0; i < size; i++) { unsigned v; sscanf(hex + 2 * i, "%2x", &v); into[i] = v; }
    return size;
}
static int file(const char *name, int flags) {
    char path[128];
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/%s", address, name);
    int fd = open(path, flags);
    if (fd < 0) die(path);
    return fd;
}
static void set_up(void) {
    uint16_t command;
    uint64_t entry;
    if (write(file("enable", O_WRONLY), "1", 1) != 1) die("enable");
    int config = file("config", O_RDWR), map = open("/proc/self/pagemap", O_RDONLY);
    if (pread(config, &command, 2, 4) != 2) die("config");
    command |= 6; /* memory, bus master */
    if (pwrite(config, &command, 2, 4) != 2) die("config");
    bar = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file("resource0", O_RDWR | O_SYNC), 0);
    page = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_LOCKED | MAP_POPULATE, -1, 0);
    if (bar == MAP_FAILED || page == MAP_FAILED) die("mmap");
    page[0] = 0;
    if (pread(map, &entry, 8, (uintptr_t)page / 4096 * 8) != 8 || !(entry >> 63)) die("pagemap");
    bus = (entry & ((1ull << 55) - 1)) * 4096;
}
static void start_queue(void) {
    put(0x214, 0);
    memset(page, 0, 4096);
    put(0x200, bus + RING); put(0x204, (bus + RING) >> 32);
    put(0x208, bus + DONE); put(0x20c, (bus + DONE) >> 32);
    put(0x210, ENTRIES);
    put(0x214, 1);
    sent = 0;
    if (get(0x218) != 1) die("the queue does not run");
}
static struct completion run(struct descriptor d) {
    d.cookie = 0xc0ffee;
    memcpy(page + RING + 64 * (sent % ENTRIES), &d, sizeof d);
    volatile struct completion *done = (void *)(page + DONE + 16 * (sent % ENTRIES));
    put(0x21c, ++sent);
    /* Without timers at first: in a lab, those of many sleeps are what its emulator trips over (docs/lab.md). */
    time_t end = time(0) + 30;
    for (unsigned looks = 0; done->number != sent; looks++) {
        if (time(0) > end) { errno = ETIMEDOUT; die("no completion"); }
        if (looks > 1000000) usleep(20000);
    }
    return *(struct completion *)done;
}
/* What is wrong with it; empty for nothing. */
static const char *encrypt(uint32_t key, uint64_t card, const char *secret, const char *sealed) {
    static const char *plain = "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
                               "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39";
    static const char *nonce_and_more = "cafebabefacedbaddecaf888feedfacedeadbeeffeedfacedeadbeefabaddad2";
    uint8_t text[128], expected[128];
    unsigned keys = bytes_of(secret, page + IN);
    if (run((struct descriptor){ STORE, 0, key, bus + IN, 0, 0, card, keys }).status) return "store";
    unsigned size = bytes_of(plain, text), more = bytes_of(nonce_and_more, page + PARAM), all = bytes_of(sealed, expected);
    memcpy(page + IN, text, size);
    memset(page + OUT, 0xee, 0x400);
    struct completion c = run((struct descriptor){ SEAL, 0, key, bus + IN, bus + OUT, bus + PARAM, card, size, 0x400, more, keys });
    if (c.status || c.written != all || memcmp(page + OUT, expected, all)) return "sealed";
    memcpy(page + IN, page + OUT, all);
    c = run((struct descriptor){ OPEN, 0, key, bus + IN, bus + OUT, bus + PARAM, card, all, 0x400, more, keys });
    if (c.status || c.written != size || memcmp(page + OUT, text, size)) return "opened";
    page[IN] ^= 1;
    c = run((struct descriptor){ OPEN, 0, key, bus + IN, bus + OUT, bus + PARAM, card, all, 0x400, more, keys });
    return c.status == NOT_AUTHENTIC ? "" : "forged";
}
/* Every other key at its own memory, its own key at all other memory of the card, DMA beyond the guest's memory. */
static void attack(uint32_t key, uint64_t start, uint64_t size) {
    unsigned refused = 0, passed = 0;
    for (uint32_t other = 0; other < 32; other++) {
        if (other == key) continue;
        struct completion c = run((struct descriptor){ LOAD, 0, other, 0, bus + OUT, 0, start, 0, 64, 0, 16 });
        if (c.status == ACCESS_FAULT) refused++; else passed++;
    }
    printf("VFAES %s attack wrong-key=%u passed=%u fault=%u fault-key=%u\n", address, refused, passed, get(0x20), get(0x24));
    put(0x20, ~0u);
    refused = passed = 0;
    for (uint64_t at = 0; at < 256ull << 20; at += 1 << 20) {
        if (at >= start && at < start + size) continue;
        struct completion c = run((struct descriptor){ LOAD, 0, key, 0, bus + OUT, 0, at, 0, 64, 0, 16 });
        if (c.status == ACCESS_FAULT) refused++; else passed++;
    }
    printf("VFAES %s attack other-memory=%u passed=%u\n", address, refused, passed);
    put(0x20, ~0u);
    refused = passed = 0;
    for (uint64_t at = 1ull << 36; at < 1ull << 38; at <<= 1) {
        struct completion c = run((struct descriptor){ STORE, 0, key, at, 0, 0, start, 16 });
        if (c.status == DMA_REFUSED) refused++; else passed++;
    }
    printf("VFAES %s attack outside=%u passed=%u fault=%u dma-refused=%u\n", address, refused, passed, get(0x20), get(0x138));
    put(0x20, ~0u);
}
int main(int argc, char **argv) {
    setvbuf(stdout, 0, _IOLBF, 0);
    if (argc < 2) return 2;
    address = argv[1];
    set_up();
    uint32_t state = ~0u;
    int attacks = argc > 2;
    for (unsigned round = 1;; sleep(5)) {
        if (get(0) != 0x53434656) { printf("VFAES %s gone\n", address); return 0; }
        if (get(0xc) != state) printf("VFAES %s state=%u\n", address, state = get(0xc));
        if (state == GONE) return 0;
        if (state != READY) continue;
        put(0x38, 0); put(0x104, 0);
        uint32_t key = get(0x3c);
        uint64_t start = get(0x108) | (uint64_t)get(0x10c) << 32, size = get(0x110) | (uint64_t)get(0x114) << 32;
        start_queue();
        const char *what = encrypt(key, start, "feffe9928665731c6d6a8f9467308308",
            "42831ec2217774244b7221b784d0d49ce3aa212f2c02a4e035c17e2329aca12e21d514b25466931c7d8f6a5aac84aa051ba30b396a0aac973d58e091"
            "5bc94fbc3221a5db94fae95ae7121a47");
        if (!*what) what = encrypt(key, start, "feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308",
            "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"
            "76fc6ece0f4e1768cddf8853bb2d551b");
        printf("VFAES %s round=%u %s %s\n", address, round++, *what ? "bad" : "good", what);
        if (attacks) { attacks = 0; attack(key, start, size); }
    }
}
