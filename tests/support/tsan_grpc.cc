// The distribution's gRPC, RocksDB and OpenSSL are not built with ThreadSanitizer: what their
// threads hand to one another by atomics looks like races. Linked into every ThreadSanitizer
// program that links gRPC, this leaves out reports with a frame of these or of the libraries they
// call. Races between a reaction and our own threads are therefore looked for where gRPC has no
// part: tests/unit/rpc drives GenerationStream, which holds all of that logic, without it.
// Also left out: the thread that mends a RocksDB store while others write to it. RocksDB's writers
// read each other's writes, and the stacks do not always show whose code that is.
extern "C" const char* __tsan_default_suppressions() {
  return "race:libgrpc.so\n"
         "race:libgrpc++.so\n"
         "race:libgpr.so\n"
         "race:libupb.so\n"
         "race:librocksdb.so\n"
         "race:libssl.so\n"
         "race:libcrypto.so\n"
         "race:TakeOutStates\n"
         "race:libabsl_\n";
}
