// The distribution's gRPC is not built with ThreadSanitizer: what its threads hand to one another
// by atomics looks like races. Linked into every ThreadSanitizer program that links gRPC, this
// leaves out reports with a frame of gRPC or of the libraries it calls. Races between a reaction
// and our own threads are therefore looked for where gRPC has no part: tests/unit/rpc drives
// GenerationStream, which holds all of that logic, without it.
extern "C" const char* __tsan_default_suppressions() {
  return "race:libgrpc.so\n"
         "race:libgrpc++.so\n"
         "race:libgpr.so\n"
         "race:libupb.so\n"
         "race:libabsl_\n";
}
