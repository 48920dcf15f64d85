import java.io.File;
import java.util.HashMap;
import java.util.Map;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/** What BenchmarkActivity does with its extras, on the JVM: `java -cp ... SimulatedApp.java APP_FOLDER EXTRAS_JSON`. */
public class SimulatedApp {
    public static void main(String[] words) {
        Map<String, String> extras = new HashMap<>();
        Matcher pairs = Pattern.compile("\"(\\w+)\": \"([^\"]*)\"").matcher(words[1]);
        while (pairs.find()) extras.put(pairs.group(1), pairs.group(2));
        File files = new File(words[0], "files");
        try {
            limeedge.app.BenchmarkRequest request = limeedge.app.BenchmarkRequest.Companion.read(extras::get);
            File file = request.run(files, new File(words[0], "cache"), new limeedge.onnx.OnnxEngines((String) null), Map.of(), (done, all) -> {
                System.out.println("round " + done + " of " + all);
                return kotlin.Unit.INSTANCE;
            });
            System.out.println("done: " + file);
        } catch (Exception error) {
            System.out.println("failed: " + error.getMessage());
        }
    }
}
